"""Runs the conversion command."""

from tarflow_hf.conversion.command import main

if __name__ == "__main__":
    main()
