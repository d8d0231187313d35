"""One image: how its bytes become RGB, and how it is turned, cropped and coloured for training."""
