"""What an exported folder needs of mixers that are not glalm's: the package to install, or a copy of the source."""

import ast
import inspect
import json
import sys
from importlib.metadata import Distribution, distributions, entry_points, packages_distributions
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from glalm.config.strict import RunError
from glalm.data.files import read_json, write_json
from glalm.hf import MODEL_TYPE_WITH_CODE
from glalm.model.config import ModelConfig
from glalm.model.mixers import ENTRY_POINT_GROUP, MIXERS

LOADER = "modeling_with_code"
LOADER_SOURCE = '''\
"""The classes of a model whose token mixer is not part of glalm. transformers imports this file if it is trusted."""

from glalm import hf
from glalm.model.mixers import register_mixer

{imports}

{registrations}


class GLALMConfig(hf.GLALMConfig):
    model_type = "{model_type}"


class GLALMModel(hf.GLALMModel):
    config_class = GLALMConfig


class GLALMForCausalLM(hf.GLALMForCausalLM):
    config_class = GLALMConfig
'''
AUTO_MAP = {
    "AutoConfig": f"{LOADER}.GLALMConfig",
    "AutoModel": f"{LOADER}.GLALMModel",
    "AutoModelForCausalLM": f"{LOADER}.GLALMForCausalLM",
}


def find_mixer_packages(config: ModelConfig) -> dict[str, str | None]:
    """Return {mixer: "package==version", or None for a file of the user's} of the mixers that are not glalm's."""
    names = dict.fromkeys(config.layer_mixers())
    return {name: find_package(name) for name in names if not MIXERS[name].__module__.startswith("glalm.")}


def find_package(name: str) -> str | None:
    """Return "package==version" of the installed package that has the mixer `name`, or None if none has it."""
    path = inspect.getfile(MIXERS[name])
    offered = [point.dist for point in entry_points(group=ENTRY_POINT_GROUP, name=name) if point.dist]
    for package in (*offered, *find_distributions(MIXERS[name].__module__)):
        if installs_file(package, path):
            return f"{package.name}=={package.version}"
    return None


def find_distributions(module: str) -> list[Distribution]:
    """Return the distributions on sys.path that say to have a module's first name."""
    names = packages_distributions().get(module.partition(".")[0], ())
    return [package for name in dict.fromkeys(names) for package in distributions(name=name)]


def installs_file(package: Distribution, path: str | None) -> bool:
    """Return whether a distribution is installed with the file `path` of a module; None: its module has no file.

    The metadata of a source tree, which building a package leaves beside the code, does not count: it is on sys.path in
    that folder only. An editable install has the files of its folder.
    """
    if package.read_text("SOURCES.txt") is not None and package.read_text("installed-files.txt") is None:
        return False  # It is an egg-info, as setuptools writes it in a source tree.
    if path is None:
        return True
    origin = json.loads(package.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return Path(path).resolve().is_relative_to(Path(url2pathname(urlparse(origin["url"]).path)).resolve())
    if package.files is None:  # Packages of an operating system have no record.
        return Path(path).resolve().is_relative_to(Path(str(package.locate_file(""))).resolve())
    # resolve() is slow, so only files of the same name are compared by it.
    same_name = (file for file in package.files if file.name == Path(path).name)
    return any(Path(str(file.locate())).resolve() == Path(path).resolve() for file in same_name)


def source_path(name: str) -> Path:
    """Return the file of the user's own that defines the mixer `name`.

    Raises:
        RunError: The file imports another one of the user's own, which a receiver of its copy would not have.
    """
    path = Path(inspect.getfile(MIXERS[name]))
    for module in list_imports(path):
        if module.startswith(".") or is_own_file(module):
            raise RunError(
                f"The mixer {name} cannot be exported: {path} imports {module}, and the exported folder would have a "
                "copy of the first file only. Put both into one file, or make them a package and install it (pip "
                "install FOLDER). Then export again."
            )
    return path


def list_imports(path: Path) -> list[str]:
    """Return the modules that a Python file imports anywhere in it. Those of relative imports begin with a dot."""
    modules = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append("." * node.level + (node.module or ""))
    return modules


def is_own_file(module: str) -> bool:
    """Return whether a module can be imported here, but comes neither with Python nor with an installed package."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top == "glalm":
        return False
    spec = find_spec(top)
    return spec is not None and not any(installs_file(package, spec.origin) for package in find_distributions(top))


def write_mixer_code(folder: Path, packages: dict[str, str | None]) -> None:
    """Complete the model folder `folder` by what its own mixers need.

    A mixer of an installed package is recorded in config.json, so that the error of a receiver without it names the
    package. If a mixer is a file of the user's own, its copy is written, and an auto_map by which transformers imports
    it with trust_remote_code=True.

    Args:
        packages: What find_mixer_packages returned.

    Raises:
        RunError: See source_path.
    """
    tree = read_json(folder / "config.json")
    if installed := {name: package for name, package in packages.items() if package is not None}:
        tree["mixer_packages"] = installed
    if None in packages.values():
        write_loader(folder, packages)
        tree |= {"model_type": MODEL_TYPE_WITH_CODE, "auto_map": AUTO_MAP}
    write_json(folder / "config.json", tree, indent=2)


def write_loader(folder: Path, packages: dict[str, str | None]) -> None:
    """Write the file of AUTO_MAP, and beside it the mixers of the user's own."""
    imports = []
    registrations = []
    for name, package in packages.items():
        if ":" not in name and package is not None:
            continue  # The registry finds it by its entry point.
        mixer = MIXERS[name]
        module = mixer.__module__
        if package is None:
            copy = module.replace(".", "_")
            (folder / f"{copy}.py").write_bytes(source_path(name).read_bytes())
            module = f".{copy}"
        alias = f"mixer_{len(imports)}"
        imports.append(f"from {module} import {mixer.__name__} as {alias}")
        registrations.append(f"register_mixer({name!r}, {alias})")
    source = LOADER_SOURCE.format(
        imports="\n".join(imports), registrations="\n".join(registrations), model_type=MODEL_TYPE_WITH_CODE
    )
    (folder / f"{LOADER}.py").write_text(source, encoding="utf-8")
