"""``python -m rmtc.cli`` is ``rmtc``."""

from rmtc.cli.app import main

if __name__ == "__main__":
    main()
