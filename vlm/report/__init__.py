"""What a person opens after a run: loss curves, scores beside their controls, a gallery; and a summary in text."""
