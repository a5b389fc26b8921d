"""`python -m runtime.simulate LOADS`: is replication worth it on this traffic? The command is in comparison.py."""

from runtime.simulate.comparison import main

if __name__ == "__main__":
    main()
