"""The page of `trace-fast app`: what it computes (`analysis`), and how it looks (`layout`)."""
