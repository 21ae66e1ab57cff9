// Small kernels, correct ones and faulty ones, for the tests of the emulation.

#ifndef SHARED
#define SHARED(type, name, count) __shared__ type name[count]
#endif
#ifndef BLOCK
#define BLOCK 32
#endif

typedef long long i64;
struct __align__(16) Words { unsigned each[4]; };
struct Pair { double real; int whole; };

#define KERNEL extern "C" __global__ void

// Adds up BLOCK numbers. Without the first barrier a thread may add a number not yet written.
template <bool GUARDED> __device__ void add_up(const float* x, float* out) {
  SHARED(float, part, BLOCK);
  const int t = (int)threadIdx.x;
  part[t] = x[t];
  if (GUARDED) __syncthreads();
  for (int reach = BLOCK / 2; reach > 0; reach /= 2) {
    if (t < reach) part[t] += part[t + reach];
    __syncthreads();
  }
  if (t == 0) *out = part[0];
}
KERNEL __launch_bounds__(BLOCK) total(const float* x, float* out) { add_up<true>(x, out); }
KERNEL __launch_bounds__(BLOCK, (2 * BLOCK) / BLOCK)
total_unguarded(const float* x, float* out) { add_up<false>(x, out); }

// Each block writes a number; the last one adds them up.
template <bool FENCED>
__device__ void add_last(const float* x, float* sums, unsigned* count, float* out) {
  SHARED(unsigned, before, 1);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = x[blockIdx.x];
    if (FENCED) __threadfence();
    before[0] = atomicInc(count, gridDim.x - 1);
  }
  __syncthreads();
  if (before[0] != gridDim.x - 1 || threadIdx.x) return;
  float all = 0;
  for (unsigned b = 0; b < gridDim.x; b++) all += sums[b];
  *out = all;
}
KERNEL last(const float* x, float* sums, unsigned* count, float* out) {
  add_last<true>(x, sums, count, out);
}
KERNEL last_unfenced(const float* x, float* sums, unsigned* count, float* out) {
  add_last<false>(x, sums, count, out);
}

// Records the order in which threads arrive.
KERNEL turns(unsigned* count, unsigned* who) {
  who[atomicAdd(count, 1u)] = blockIdx.x * blockDim.x + threadIdx.x;
}

KERNEL some_leave(int keep) {
  if ((int)threadIdx.x < keep) __syncthreads();
}
KERNEL two_barriers(int keep) {
  if ((int)threadIdx.x < keep)
    __syncthreads();
  else
    __syncthreads();
}
KERNEL warp_and_block(int keep) {
  if ((int)threadIdx.x < keep)
    __syncwarp();
  else
    __syncthreads();
}

// Thread t stores in `out` what its mirror image in the warp, t ^ 31, has told it.
KERNEL neighbours(unsigned* out) {
  SHARED(unsigned, told, BLOCK);
  told[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = told[threadIdx.x ^ 31u];
}

KERNEL shared_index(int place, int* out) {
  SHARED(int, few, 4);
  if (threadIdx.x) return;
  few[place] = 1;
  *out = few[place];
}
KERNEL shared_pointer(int place, int* out) {
  SHARED(int, few, 4);
  if (threadIdx.x) return;
  int* plain = few;
  plain[place] = 1;
  *out = plain[place];
}
// Stores what each block's shared memory holds at first.
KERNEL shared_fresh(float* out) {
  SHARED(float, few, 4);
  if (threadIdx.x == 0) out[blockIdx.x] = few[0], few[0] = 1;
}
KERNEL shared_much(float* out) {
  SHARED(double, one, 4096);
  SHARED(double, other, 4096);
  if (threadIdx.x == 0) one[0] = other[0] = *out;
}

KERNEL read_at(const float* x, i64 place, float* out) {
  if (threadIdx.x == 0) *out = x[place];
}
KERNEL write_at(float* x, i64 place) {
  if (threadIdx.x == 0) x[place] = 1;
}
KERNEL copy_words(const float* x, float* out) {
  if (threadIdx.x == 0) *(Words*)out = *(const Words*)x;
}
KERNEL divide(i64 number, i64 by, i64* out) {
  if (threadIdx.x == 0) *out = number / by;
}
KERNEL by_value(Pair pair, float narrow, unsigned short bits, double* out) {
  out[0] = pair.real + pair.whole + narrow + bits;
}
KERNEL powers(const float* x, float* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = expf(x[i]);
}
KERNEL product(const float* x, float* out) { *out = x[0] * x[1]; }

#ifdef MORE
KERNEL more(const void* nothing) {}
#endif
