"""The benchmark of one GPU: slices of the large models, the device's own matrix peak, where the time goes."""
