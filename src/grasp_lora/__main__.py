"""`python -m grasp_lora` is the same command as `grasp-lora`."""

from grasp_lora.cli import main

if __name__ == "__main__":
    main()
