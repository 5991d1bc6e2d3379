"""``python -m torch_s3.cli``."""

from torch_s3.cli import main

main()
