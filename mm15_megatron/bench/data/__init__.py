"""The benchmark of the data path: each case beside a named peer, on the same work, in one run."""
