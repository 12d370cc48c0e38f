# liblacuna_torch.so: torch.ops.lacuna for Python (docs/python.md). It holds what it needs of the lower tiers, shows none of
# it, and takes libtorch from the process that loads it.

file(GLOB python_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/lacuna/python/*.cc)
add_library(lacuna_python SHARED ${python_sources})
set_target_properties(lacuna_python PROPERTIES OUTPUT_NAME lacuna_torch LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}
                                               DEFINE_SYMBOL "")  # the precompiled headers know none
target_link_libraries(lacuna_python PRIVATE lacuna_model)
target_link_options(lacuna_python PRIVATE "LINKER:--exclude-libs,ALL" "LINKER:--as-needed")
lacuna_options(lacuna_python)
lacuna_precompile(lacuna_python FROM lacuna_model)

if(LACUNA_TESTS)
  # The interpreter of the environment that libtorch comes from; 77: its torch can't be imported.
  find_program(LACUNA_PYTHON NAMES python python3 HINTS ${CMAKE_SOURCE_DIR}/.venv/bin NO_CMAKE_SYSTEM_PATH)
  if(LACUNA_PYTHON)
    add_test(NAME python COMMAND ${LACUNA_PYTHON} ${CMAKE_SOURCE_DIR}/tests/python/ops_test.py)
    set_tests_properties(python PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 600
                         ENVIRONMENT "LACUNA_TORCH_LIBRARY=$<TARGET_FILE:lacuna_python>")
  endif()
endif()
