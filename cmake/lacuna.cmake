# How a folder of src/lacuna becomes a library and a folder of tests/ becomes a test program. A new .cc file is picked
# up by its place alone; files for one instruction set carry it in their name and get its flags.

function(lacuna_options target)
  # psabi: vectors wider than the target's registers stay inside their file.
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wshadow -Wno-missing-field-initializers -Wno-psabi)
  if(LACUNA_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${LACUNA_SANITIZE} -fno-sanitize-recover=all
                                             -fno-omit-frame-pointer)
    target_link_options(${target} PRIVATE -fsanitize=${LACUNA_SANITIZE})
  endif()
  if(LACUNA_FUZZ)
    target_compile_options(${target} PRIVATE -fsanitize=fuzzer-no-link)
  endif()
endfunction()

function(lacuna_isa_flags)
  foreach(source IN LISTS ARGN)
    if(source MATCHES "_(avx512|amx)[a-z0-9_]*\\.cc$")
      set(flags "-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;-mavx512vbmi2;-mavx512vnni;-mavx512bf16;-mavx2;-mfma;-mf16c;-mbmi;-mbmi2;-mpopcnt")
      if(source MATCHES "_amx")
        list(APPEND flags -mamx-tile -mamx-bf16 -mamx-int8)
      endif()
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${flags}")
    elseif(source MATCHES "_avx2[a-z0-9_]*\\.cc$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c;-mbmi;-mbmi2;-mpopcnt")
    endif()
    if(source MATCHES "_avx(2|512)[a-z0-9_]*\\.cc$")
      set_source_files_properties(${source} PROPERTIES SKIP_PRECOMPILE_HEADERS ON)  # other flags
    endif()
  endforeach()
endfunction()

# lacuna_precompile(target headers... | FROM other): libtorch's headers cost ten seconds a file, nlohmann's four: more than
# all that is ours.
# Files still include what they need: -DLACUNA_PCH=OFF builds without.
function(lacuna_precompile target)
  cmake_parse_arguments(ARG "" "FROM" "" ${ARGN})
  if(NOT LACUNA_PCH OR NOT TARGET ${target})
    return()
  endif()
  if(ARG_FROM)
    target_precompile_headers(${target} REUSE_FROM ${ARG_FROM})
  else()
    target_precompile_headers(${target} PRIVATE ${ARG_UNPARSED_ARGUMENTS})
  endif()
  target_compile_options(${target} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-fpch-preprocess>)  # ccache asks for it
endfunction()

# lacuna_library(folder [RECURSE] DEPENDS ...): target lacuna_folder ("io/gguf" -> lacuna_io_gguf).
function(lacuna_library folder)
  cmake_parse_arguments(ARG "RECURSE" "" "DEPENDS" ${ARGN})
  if(ARG_RECURSE)
    file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/lacuna/${folder}/*.cc)
  else()
    file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/lacuna/${folder}/*.cc)
  endif()
  string(REPLACE "/" "_" name ${folder})
  if(sources)
    lacuna_isa_flags(${sources})
    add_library(lacuna_${name} STATIC ${sources})
    target_include_directories(lacuna_${name} PUBLIC ${CMAKE_SOURCE_DIR}/src)
    target_link_libraries(lacuna_${name} PUBLIC ${ARG_DEPENDS})
    lacuna_options(lacuna_${name})
  else()
    add_library(lacuna_${name} INTERFACE)
    target_include_directories(lacuna_${name} INTERFACE ${CMAKE_SOURCE_DIR}/src)
    target_link_libraries(lacuna_${name} INTERFACE ${ARG_DEPENDS})
  endif()
endfunction()

# lacuna_tests(folders...): one program a folder from tests/FOLDER/*.cc, run by ctest.
function(lacuna_tests)
  foreach(folder IN LISTS ARGN)
    file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/${folder}/*.cc)
    if(NOT sources)
      continue()
    endif()
    string(REPLACE "/" "_" name ${folder})
    add_executable(${name}_test ${sources} ${CMAKE_SOURCE_DIR}/tests/support/main.cc
                                ${CMAKE_SOURCE_DIR}/tests/support/data.cc)
    target_include_directories(${name}_test PRIVATE ${CMAKE_SOURCE_DIR}/tests)
    target_link_libraries(${name}_test PRIVATE lacuna_${name} GTest::gtest GTest::gmock)
    target_compile_definitions(${name}_test PRIVATE LACUNA_SOURCE_DIR="${CMAKE_SOURCE_DIR}"
                                                    LACUNA_BINARY_DIR="${CMAKE_BINARY_DIR}")
    lacuna_options(${name}_test)
    # Only the kernels' tests work long enough themselves to need speed; optimising takes a third of the compiler's time.
    if(NOT name STREQUAL kernels)
      target_compile_options(${name}_test PRIVATE $<$<CONFIG:Release>:-O1>)
    endif()
    add_test(NAME ${name} COMMAND ${name}_test)
    set_tests_properties(${name} PROPERTIES TIMEOUT 1500)
  endforeach()
endfunction()
