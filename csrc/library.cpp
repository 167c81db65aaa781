// The extension module itself: what the processor can do, and the entry point of `import fastllm._C`.
// The ops register themselves (csrc/cpu/*.cpp); their schemas stand beside their definitions in fastllm/ops, because
// the package must work where this library could not be built.
#include <Python.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/binding.h"

namespace fastllm {

static constexpr const char* isa_names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

static Isa detect() {
  int best = 0;
#if defined(FASTLLM_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
  if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    best = __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  }
#endif
  if (const char* asked = std::getenv("FASTLLM_CPU_CAPABILITY")) {
    for (int i = 0; i < best; ++i) {
      if (std::strcmp(asked, isa_names[i]) == 0) return Isa(i);
    }
  }
  return Isa(best);
}

Isa isa() {
  static const Isa found = detect();
  return found;
}

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t page = size_t(2) << 20;
  if (bytes < 4 * page) return;
  const uintptr_t begin = (uintptr_t(data) + page - 1) / page * page, end = (uintptr_t(data) + bytes) / page * page;
  if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // advice only: a refusal changes nothing
#endif
}

}  // namespace fastllm

static PyObject* capability(PyObject*, PyObject*) {
  return PyUnicode_FromString(fastllm::isa_names[int(fastllm::isa())]);
}

// For buffers that Python allocates: torch.empty does not ask.
static PyObject* advise(PyObject*, PyObject* arguments) {
  unsigned long long address = 0, bytes = 0;
  if (!PyArg_ParseTuple(arguments, "KK", &address, &bytes)) return nullptr;
  fastllm::advise_huge_pages((void*)uintptr_t(address), size_t(bytes));
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"advise_huge_pages", advise, METH_VARARGS, "Asks the kernel for huge pages under (address, bytes)."},
    {"capability", capability, METH_NOARGS, "The instruction set the CPU kernels run with."},
    {nullptr, nullptr, 0, nullptr},
};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) { return PyModule_Create(&module); }
