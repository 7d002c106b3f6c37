"""The demo as a Space on the Hugging Face Hub."""

from diffusers_dod.demo import main


if __name__ == "__main__":
    main(["--host", "0.0.0.0", "--port", "7860", "--max_waiting", "20"])  # noqa: S104 (the proxy of the Space)
