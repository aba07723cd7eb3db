"""The tokenizer: Chinese pieces trained, chosen, merged into the base, written for every reader."""
