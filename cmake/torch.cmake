# libtorch out of the PyPI wheel as plain imported targets. (The wheel's own CMake file insists on a CUDA toolkit even
# when only libtorch_cpu is used.) The tool links libtorch_cpu alone; libtorch_cuda is loaded at run time where a GPU is.

if(NOT LACUNA_TORCH_DIR)
  file(GLOB candidates ${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch)
  if(candidates)
    list(GET candidates 0 LACUNA_TORCH_DIR)
  endif()
endif()
if(NOT EXISTS ${LACUNA_TORCH_DIR}/lib/libtorch_cpu.so)
  message(FATAL_ERROR "libtorch not found (LACUNA_TORCH_DIR='${LACUNA_TORCH_DIR}'). Run ./dev setup, or pass "
                      "-DLACUNA_TORCH_DIR=.../site-packages/torch, or -DLACUNA_TORCH=OFF for the kernel tier alone.")
endif()

# The wheel carries headers of another {fmt} than the one that is linked here; ours must be found first.
get_target_property(fmt_include fmt::fmt INTERFACE_INCLUDE_DIRECTORIES)
list(GET fmt_include 0 fmt_include)
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/include_first)
file(CREATE_LINK ${fmt_include}/fmt ${CMAKE_BINARY_DIR}/include_first/fmt SYMBOLIC)

add_library(lacuna_torch INTERFACE)
target_include_directories(lacuna_torch SYSTEM INTERFACE ${CMAKE_BINARY_DIR}/include_first
                                                         ${LACUNA_TORCH_DIR}/include
                                                         ${LACUNA_TORCH_DIR}/include/torch/csrc/api/include)
target_link_libraries(lacuna_torch INTERFACE ${LACUNA_TORCH_DIR}/lib/libtorch_cpu.so ${LACUNA_TORCH_DIR}/lib/libc10.so)
file(GLOB nvidia_lib_dirs ${LACUNA_TORCH_DIR}/../nvidia/*/lib)
set(rpath ${LACUNA_TORCH_DIR}/lib ${nvidia_lib_dirs})
target_link_options(lacuna_torch INTERFACE "LINKER:--allow-shlib-undefined")
foreach(dir IN LISTS rpath)
  target_link_options(lacuna_torch INTERFACE "LINKER:-rpath,${dir}")
endforeach()
