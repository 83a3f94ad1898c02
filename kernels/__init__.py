"""GPU kernels. Shipped as `rocm_attn_compile.kernels`, kept in a top-level folder of the repository.

The sub-folders have no `__init__.py` on purpose: a regular package named `triton` here would shadow the real one
whenever this folder is on `sys.path`. This folder needs one, or an editable install does not find it; so where the
repository root is on `sys.path` (`python -c`, `python -m`), `import kernels` lands here, and we step aside for the
package of that name on the rest of the path (Hugging Face's, which transformers imports).
"""

if __name__ == "kernels":
    import os
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    _root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    _spec = PathFinder.find_spec("kernels", [path for path in sys.path if os.path.abspath(path) != _root])
    if _spec is not None and _spec.loader is not None:
        _module = module_from_spec(_spec)
        sys.modules["kernels"] = _module
        _spec.loader.exec_module(_module)
    # Else stay, empty: transformers imports what it finds, sees no version, and takes it for not installed.
