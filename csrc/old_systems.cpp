// What headers of a newer compiler or C library ask for and older systems lack, so that a library built here is loaded
// by them too: by glibc 2.28 and the libstdc++ of GCC 8, which torch's own wheels ask for (manylinux_2_28).
// exports.map keeps these definitions inside the library. tests/test_wheel.py reads which symbols are asked for.
#include <new>
#include <sstream>

#if defined(__GLIBCXX__) && defined(__linux__)
#include <features.h>

#if defined(_GLIBCXX_RELEASE) && _GLIBCXX_RELEASE >= 9
// GLIBCXX_3.4.26: up to GCC 8 these two are made by a constructor with an argument.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
#endif

#if defined(_GLIBCXX_RELEASE) && _GLIBCXX_RELEASE >= 11
// GLIBCXX_3.4.29: of a std::vector that is larger than the address space.
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
#endif

#if defined(_GLIBCXX_RELEASE) && _GLIBCXX_RELEASE >= 13
// GLIBCXX_3.4.32: <iostream>, which torch's headers include, asks for it so that std::cout and its like are ready. Up
// to GCC 12 every file that includes <iostream> has an object like this one.
namespace std {
static ios_base::Init streams;
void ios_base_library_init() {}
}  // namespace std
#endif

#if defined(__GLIBC_PREREQ) && __GLIBC_PREREQ(2, 32)
// GLIBC_2.32: whether std::shared_ptr may count without atomic operations. 0: it may not, as up to GCC 10.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif

#if defined(__GLIBC_PREREQ) && __GLIBC_PREREQ(2, 34) && (defined(__x86_64__) || defined(__aarch64__))
// GLIBC_2.34, which headers of torch 2.15 ask for: before, dlsym was in libdl, which Python and torch have loaded.
#if defined(__x86_64__)
__asm__(".symver oldest_dlsym,dlsym@GLIBC_2.2.5");
#else
__asm__(".symver oldest_dlsym,dlsym@GLIBC_2.17");
#endif
extern "C" void* oldest_dlsym(void* handle, const char* name);
extern "C" void* dlsym(void* __restrict handle, const char* __restrict name) noexcept {
  return oldest_dlsym(handle, name);
}
#endif

#endif
