# liblacuna_cuda.so: every .cu of the kernels, beside the tool. Nothing links it; the tool loads it where a GPU is
# (src/lacuna/kernels/gpu_linear.cc). It compiles without a GPU, and runs only on one.

set(CMAKE_CUDA_ARCHITECTURES 80-virtual 90a-real CACHE STRING "CUDA architectures")
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 doesn't know that nvcc has it
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
file(GLOB_RECURSE cuda_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/lacuna/kernels/*.cu)
# A file for one compute capability carries it in its name and is compiled for that one alone.
add_library(lacuna_cuda SHARED)
foreach(source IN LISTS cuda_sources)
  get_filename_component(name ${source} NAME_WE)
  if(source MATCHES "cuda_sm90[a-z0-9_]*\\.cu$")
    set(architectures 90a-real)
  else()
    set(architectures 80-real 90-real 90-virtual)
  endif()
  get_filename_component(folder ${source} DIRECTORY)
  get_filename_component(folder ${folder} NAME)
  set(object cuda_${folder}_${name})
  add_library(${object} OBJECT ${source})
  target_include_directories(${object} PRIVATE ${CMAKE_SOURCE_DIR}/src)
  set_target_properties(${object} PROPERTIES CUDA_ARCHITECTURES "${architectures}" POSITION_INDEPENDENT_CODE ON
                                          CUDA_VISIBILITY_PRESET hidden)
  target_compile_options(${object} PRIVATE -Xcompiler=-Wall)
  target_sources(lacuna_cuda PRIVATE $<TARGET_OBJECTS:${object}>)
endforeach()
set_target_properties(lacuna_cuda PROPERTIES LINKER_LANGUAGE CUDA CUDA_RUNTIME_LIBRARY Static)
target_link_options(lacuna_cuda PRIVATE "LINKER:--exclude-libs,ALL")
if(TARGET lacuna)  # one interface (gpu_abi.h): never one without the other
  add_dependencies(lacuna lacuna_cuda)
endif()
