"""From a folder to a model that serves: what the device can do, and checks at the model itself."""
