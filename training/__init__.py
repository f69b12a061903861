"""The slim trainer: `python -m training --config training/configs/base.yaml`."""
