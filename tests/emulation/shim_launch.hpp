// A kernel's parameters, derived from its type, and a launch from the addresses of arguments, as
// cuLaunchKernel takes them. Included after the text of the kernels.
#pragma once

#include <tuple>
#include <type_traits>

namespace shim {

struct Parameter {
  char kind;  // p: pointer; f, i, b: floating, integer, bool; s: class
  char pointee;  // the same for what a pointer points to; v: void
  unsigned size, pointee_size, pointee_alignment;
};

// Launch bounds, which may also have a number of blocks.
template <class... Rest>
constexpr int first(int threads, Rest...) {
  return threads;
}

template <class T>
constexpr char kind_of() {
  if constexpr (std::is_pointer_v<T>) return 'p';
  if constexpr (std::is_same_v<T, bool>) return 'b';
  if constexpr (std::is_floating_point_v<T>) return 'f';
  if constexpr (std::is_integral_v<T>) return 'i';
  if constexpr (std::is_void_v<T>) return 'v';
  return 's';
}

template <class T>
constexpr Parameter parameter() {
  static_assert(std::is_trivially_copyable_v<T>, "a launch copies arguments byte by byte");
  using Pointee = std::remove_cv_t<std::remove_pointer_t<T>>;
  Parameter found{kind_of<T>(), kind_of<Pointee>(), sizeof(T), 0, 1};
  if constexpr (std::is_pointer_v<T> && !std::is_void_v<Pointee>) {
    found.pointee_size = sizeof(Pointee);
    found.pointee_alignment = alignof(Pointee);
  }
  return found;
}

struct Kernel {
  const char *name;
  int bound;  // the most threads of a block, 0 if the text sets no bound
  int count;
  const Parameter *parameters;
  void (*launch)(void **arguments, Index grid, Index block, const How &how);
};

template <auto kernel>
struct Launcher;

template <class... Types, void (*kernel)(Types...)>
struct Launcher<kernel> {
  using Values = std::tuple<std::remove_cv_t<Types>...>;
  static constexpr Parameter parameters[sizeof...(Types) + 1] = {
      parameter<std::remove_cv_t<Types>>()..., Parameter{}};

  static void call(void *values) { std::apply(kernel, *static_cast<Values *>(values)); }

  static void launch(void **arguments, Index grid, Index block, const How &how) {
    int i = 0;
    // In braces, so that they are evaluated in order.
    Values values{copied<std::remove_cv_t<Types>>(arguments[i++])...};
    run(&call, &values, grid, block, how);
  }

  template <class T>
  static T copied(const void *from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
  }

  static constexpr Kernel described(const char *name, int bound) {
    return {name, bound, sizeof...(Types), parameters, &launch};
  }
};

}  // namespace shim

#define SHIM_KERNEL(name, bound) shim::Launcher<&::name>::described(#name, bound)
