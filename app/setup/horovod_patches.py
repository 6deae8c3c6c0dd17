"""Patches for Horovod's source, applied before it is built: `PATCHES` of (file, old text, new text).

The last occurrence of the old text in the file is replaced.
"""

USE_CHOSEN_INTERFACE = (
    (
        "horovod/common/gloo/gloo_context.cc",
        "device_attr.iface = gloo_iface_;",
        "device_attr.iface = global_context.gloo_iface_;",
    ),
)
"""Horovod 0.28.1 uses HOROVOD_GLOO_IFACE only for its first connections. The connections for gradients, which
this file opens last, use the interface of the host's name, and fail if the name has no address."""

WAKE_FOR_WAITING_THREADS = (
    (
        "horovod/common/global_state.h",
        "#include <queue>\n",
        "#include <condition_variable>\n#include <mutex>\n#include <queue>\n",
    ),
    (
        "horovod/common/global_state.h",
        "  std::chrono::steady_clock::time_point last_cycle_start;\n",
        """  std::chrono::steady_clock::time_point last_cycle_start;

  // How many threads wait for a result.
  int num_waiting = 0;
  std::mutex waiting_mutex;
  std::condition_variable waiting;
""",
    ),
    (
        "horovod/common/operations.cc",
        "    std::this_thread::sleep_for(sleep_duration);\n  }\n  state.last_cycle_start",
        """    std::unique_lock<std::mutex> lock(state.waiting_mutex);
    state.waiting.wait_for(lock, sleep_duration, [&] { return state.num_waiting > 0; });
  }
  state.last_cycle_start""",
    ),
    (
        "horovod/common/operations.cc",
        "int horovod_is_initialized() {",
        """void horovod_waiting(int change) {
  {
    std::lock_guard<std::mutex> lock(horovod_global.waiting_mutex);
    horovod_global.num_waiting += change;
  }
  horovod_global.waiting.notify_all();
}

int horovod_is_initialized() {""",
    ),
    (
        "horovod/common/operations.h",
        'extern "C" {\n',
        """extern "C" {

// Tells the background thread that one more thread (1), or one fewer (-1), waits for a result.
void horovod_waiting(int change);
""",
    ),
    (
        "horovod/torch/mpi_ops_v2.cc",
        "void WaitAndClear(int handle) {\n",
        "void WaitAndClear(int handle) {\n  common::horovod_waiting(1);\n",
    ),
    (
        "horovod/torch/mpi_ops_v2.cc",
        "  auto status = handle_manager.ReleaseHandle(handle);\n  ThrowIfError(*status);\n}\n\nvoid Reset",
        """  common::horovod_waiting(-1);
  auto status = handle_manager.ReleaseHandle(handle);
  ThrowIfError(*status);
}

void Reset""",
    ),
)
"""Horovod's background thread sleeps for the cycle time between two rounds, so that one round reduces several
gradients. It slept even while the program only waited for a result, so the cycle had to be short, although
each round exchanges messages among all ranks, which delays the backward pass. With this patch it wakes up as
soon as a thread waits for a result, so the cycle can be long."""

INCLUDE_ONLY_WHAT_IS_USED = tuple(
    (
        f"horovod/torch/{file}",
        "#include <torch/extension.h>\n#include <torch/torch.h>\n",
        "#include <torch/types.h>\n#include <torch/csrc/utils/pybind.h>\n",
    )
    for file in ("adapter_v2.h", "mpi_ops_v2.cc")
)
"""Horovod uses PyTorch's tensors and their conversion from Python. Its includes bring all of PyTorch's C++
API, which doubles the compiler's time for the two largest files."""

PATCHES = USE_CHOSEN_INTERFACE + WAKE_FOR_WAITING_THREADS + INCLUDE_ONLY_WHAT_IS_USED
