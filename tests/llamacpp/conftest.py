"""llama.cpp itself, through llama-cpp-python. `make test-llamacpp` installs it and runs these."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("llama_cpp") else ["test_*.py"]
