"""`python -m chinese_llama` is the command `chinese-llama`."""

from chinese_llama.cli import main

main()
