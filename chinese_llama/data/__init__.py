"""From files to blocks of token ids."""
