// Runs recorded launches again, with separate memory for each array, and compares the results.
// Built by replay.py, once for each text, its options and sanitizer: SHIM_TEXT names the text.

#include SHIM_TEXT

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr size_t ALIGNMENT = 256;

// A stretch of memory of exactly its size, at the same offset from a 256-byte boundary as when it
// was recorded, so that its alignment is the same.
class Extent {
 public:
  Extent(size_t offset, size_t bytes) : bytes(bytes) {
    const size_t all = offset + bytes;
    if (posix_memalign(&whole, ALIGNMENT, all)) abort();
    memory = static_cast<unsigned char *>(whole) + offset;
#ifdef __SANITIZE_ADDRESS__
    shim::__asan_poison_memory_region(whole, offset);
#endif
  }
  Extent(Extent &&other) noexcept
      : bytes(other.bytes), memory(other.memory), whole(std::exchange(other.whole, nullptr)) {}
  ~Extent() { free(whole); }

  const size_t bytes;
  unsigned char *memory;

 private:
  void *whole = nullptr;
};

struct Launch {
  std::string kernel;
  shim::Index grid{}, block{};
  std::vector<Extent> extents;
  std::vector<std::vector<unsigned char>> arguments;
  std::vector<std::string> after;
};

void read(std::istream &file, Extent &extent) {
  file.read(reinterpret_cast<char *>(extent.memory), static_cast<std::streamsize>(extent.bytes));
}

Launch load(const char *path) {
  Launch launch;
  std::ifstream file(path, std::ios::binary);
  std::string text, word;
  while (std::getline(file, text) && text != "end") {
    std::istringstream line(text);
    line >> word;
    if (word == "kernel") line >> launch.kernel;
    if (word == "grid") line >> launch.grid.x >> launch.grid.y >> launch.grid.z;
    if (word == "block") line >> launch.block.x >> launch.block.y >> launch.block.z;
    if (word == "extent") {
      size_t offset, bytes;
      line >> offset >> bytes;
      launch.extents.emplace_back(offset, bytes);
    }
    if (word == "pointer") {
      size_t which, offset;
      line >> which >> offset;
      const unsigned char *place = launch.extents.at(which).memory + offset;
      launch.arguments.emplace_back(sizeof place);
      memcpy(launch.arguments.back().data(), &place, sizeof place);
    }
    if (word == "value") {
      size_t bytes;
      std::string digits;
      line >> bytes >> digits;
      launch.arguments.emplace_back(bytes);
      for (size_t i = 0; i < bytes; i++)
        launch.arguments.back()[i] =
            static_cast<unsigned char>(std::stoul(digits.substr(2 * i, 2), nullptr, 16));
    }
  }
  for (Extent &extent : launch.extents) read(file, extent);
  for (const Extent &extent : launch.extents) {
    launch.after.emplace_back(extent.bytes, '\0');
    file.read(launch.after.back().data(), static_cast<std::streamsize>(extent.bytes));
  }
  if (!file) {
    std::cerr << path << " is no whole recording\n";
    exit(2);
  }
  return launch;
}

const shim::Kernel &find(const std::string &name) {
  for (const shim::Kernel &kernel : shim_kernels)
    if (name == kernel.name) return kernel;
  std::cerr << "the text has no kernel " << name << "\n";
  exit(2);
}

// Reports which bytes differ from the recording after the launch, if any.
std::string difference(const Launch &launch) {
  for (size_t i = 0; i < launch.extents.size(); i++) {
    const Extent &extent = launch.extents[i];
    for (size_t b = 0; b < extent.bytes; b++)
      if (extent.memory[b] != static_cast<unsigned char>(launch.after[i][b]))
        return launch.kernel + " leaves byte " + std::to_string(b) + " of extent " +
               std::to_string(i) + " other than it was recorded";
  }
  return "";
}

}  // namespace

// Reports that each recording was run, and whether it differs; a sanitizer's finding ends the run.
int main(int count, char **paths) {
  for (int i = 1; i < count; i++) {
    Launch launch = load(paths[i]);
    std::vector<void *> arguments;
    for (auto &argument : launch.arguments) arguments.push_back(argument.data());
    find(launch.kernel).launch(arguments.data(), launch.grid, launch.block, {});
    const std::string wrong = difference(launch);
    if (!wrong.empty()) std::cout << "differs " << paths[i] << ": " << wrong << "\n";
    std::cout << "ran " << paths[i] << std::endl;
  }
}
