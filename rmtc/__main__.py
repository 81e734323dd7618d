"""The entry point of ``python -m rmtc``, which is ``rmtc``."""

from rmtc.cli.app import main

if __name__ == "__main__":
    main()
