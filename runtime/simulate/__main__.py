"""`python -m runtime.simulate`: see `runtime.simulate.comparison`."""

from runtime.simulate.comparison import main

if __name__ == "__main__":
    main()
