.PHONY: help demo test test-previous coverage lint format wheel venv
help demo test test-previous coverage lint format wheel venv:
	./run $@
