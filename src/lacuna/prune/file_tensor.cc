#include "lacuna/prune/file_tensor.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

namespace lacuna::prune {

Result<at::Tensor> file_tensor(const std::filesystem::path& folder, at::IntArrayRef shape,
                               at::ScalarType type) {
  const auto bytes = static_cast<size_t>(c10::multiply_integers(shape)) * c10::elementSize(type);
  std::string name = (folder / ".lacuna-states-XXXXXX").string();
  const int file = ::mkstemp(name.data());
  const auto failed = [&](int error) {
    return check_failed("{}: no file of {:.2f} GiB can be made there ({}). Free some room.",
                        folder.string(), static_cast<double>(bytes) / (1 << 30),
                        std::strerror(error));
  };
  if (file < 0) return failed(errno);
  ::unlink(name.c_str());
  // What a write to a mapped hole finds on a full disk is the end of the process.
  const int refused = ::posix_fallocate(file, 0, static_cast<off_t>(bytes));
  void* const data = refused != 0
                         ? MAP_FAILED
                         : ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  const int error = refused != 0 ? refused : errno;
  ::close(file);
  if (data == MAP_FAILED) return failed(error);
  return at::from_blob(
      data, shape, [bytes](void* mapped) { ::munmap(mapped, bytes); },
      at::TensorOptions().dtype(type));
}

void give_back(const at::Tensor& rows) {
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGE_SIZE));
  const auto begin = reinterpret_cast<uintptr_t>(rows.data_ptr()), end = begin + rows.nbytes();
  const uintptr_t first = begin / page * page;  // a neighbour's bytes are in the file as well
  ::madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
}

}  // namespace lacuna::prune
