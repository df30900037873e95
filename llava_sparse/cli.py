"""The command `llava-sparse` as `python -m llava_sparse.cli`; all of it is in `llava_sparse_cli`."""

from llava_sparse_cli import app as app
from llava_sparse_cli import main as main

if __name__ == "__main__":
    main()
