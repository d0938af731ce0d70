.PHONY: demo test test-previous coverage lint format wheel venv
demo test test-previous coverage lint format wheel venv:
	./run $@
