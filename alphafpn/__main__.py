"""`python -m alphafpn`."""

from alphafpn.cli import main

if __name__ == "__main__":
    main()
