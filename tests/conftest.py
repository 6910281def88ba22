"""Set-up shared by all tests: eight host devices, run-time checked shapes, the optional folder of real data.

Everything above the imports of jax must stay above them: XLA and BLAS read their flags once, when they start.
"""

import gc
import os
import pathlib
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
# Hundreds of small programs are compiled and run once: at LLVM's level 1 that takes a third less time than at 3.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=1"]
).strip()
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # two test processes may both compile for a TPU topology
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no metadata server to ask about the topology
os.environ.setdefault("MPLBACKEND", "agg")
# Worker processes share the cores: BLAS threads that wait for one another there spin, and small solves take minutes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Shapes and types of public functions are checked in tests only; users pay nothing for the annotations.
install_import_hook(["earth", "moe", "rl"], "beartype.beartype")

# First calls compile, so wall-clock deadlines would only measure XLA. derandomize: a red run is red again.
settings.register_profile(
    "house", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("house")

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
SHARED_DATA = CHECKOUT.parent / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    if jax.device_count() != 8:
        raise pytest.UsageError(f"the tests need 8 host devices, JAX started with {jax.device_count()}")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Frees the compiled programs of a module when it ends.

    XLA:CPU maps every program into memory on its own; thousands of them reach the kernel's limit of mappings
    (vm.max_map_count, 65,530), where the process dies of a segmentation fault, and hold 6 GB before that.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def checkout() -> pathlib.Path:
    """The root of the checkout."""
    return CHECKOUT


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real observations beside the checkout; the test is skipped where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def taiwan_parquet(shared_data: pathlib.Path) -> pathlib.Path:
    """Hourly reports of Taiwan's weather stations, June 2020 to December 2021."""
    path = shared_data / "taiwan_hourly_2020-06_2021-12.parquet"
    if not path.is_file():
        pytest.skip(f"no {path.name} in ../shared/data")
    return path
