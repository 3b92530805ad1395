"""Settings of every test."""

import hypothesis

hypothesis.settings.register_profile("batchnorm", derandomize=True, deadline=None, print_blob=True, max_examples=100)
hypothesis.settings.load_profile("batchnorm")
