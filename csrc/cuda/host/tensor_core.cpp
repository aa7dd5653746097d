// The matrix instructions on the host: fragments laid out as the PTX ISA says (sections "mma.m16n8k8", "mma.m16n8k16"
// and "ldmatrix"), sums rounded as the chip does.
//
// Products of bfloat16 or tf32 operands are exact in float32 and wider. The chip adds them in groups to the
// accumulator: every addend is aligned to the largest and cut off there, and so is the sum (Fasi, Higham, Mikaitis,
// Pranesh: Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 2021). Groups here are those of the A100,
// the smallest of the chips that these kernels run on, with one bit beyond float32's 24, so this rounds no less than
// they do.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/host/emulation.h"

namespace jlebm {
namespace cuda {
namespace {

constexpr int kGuardBits = 1;
constexpr int kTf32Group = 4, kBf16Group = 8;

uint64_t double_bits(double v) {
    uint64_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
}
double power_of_two(int e) {
    const uint64_t bits = uint64_t(e + 1023) << 52;
    double v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}
int exponent_of(double v) { return int(double_bits(v) >> 52 & 0x7ff) - 1023; } // of 0: -1023, below all others

float cut_to_float(double v) {
    float rounded = float(v);
    if (std::fabs(double(rounded)) > std::fabs(v)) rounded = std::nextafter(rounded, 0.0f);
    return rounded;
}

template <int kGroup>
float accumulate(float c, const float* a, const float* b) {
    double terms[kGroup + 1];
    terms[kGroup] = c;
    for (int k = 0; k < kGroup; ++k) terms[k] = double(a[k]) * double(b[k]);
    int largest = -1023;
    bool finite = true;
    for (double term : terms) {
        const int e = exponent_of(term);
        finite = finite && e < 1024;
        largest = e > largest ? e : largest;
    }
    if (!finite) {
        double sum = 0.0;
        for (double term : terms) sum += term;
        return float(sum);
    }
    if (largest == -1023) return 0.0f;
    const double scale = power_of_two(23 + kGuardBits - largest);
    int64_t sum = 0;
    for (double term : terms) sum += int64_t(term * scale);
    return cut_to_float(double(sum) / scale);
}

struct Operands {
    uint32_t a[4], b[2];
};

Operands operands_of(const host::Exchange& all, int lane) {
    Operands o;
    std::memcpy(&o, all.in[lane], sizeof o);
    return o;
}

float tf32_operand(uint32_t bits) { return bits_float(bits & 0xffffe000u); } // the low bits are not read
float half_of(uint32_t pair, int high) { return from_bf16(uint16_t(high ? pair >> 16 : pair)); }

} // namespace

void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Operands mine;
    std::memcpy(mine.a, a, sizeof mine.a);
    std::memcpy(mine.b, b, sizeof mine.b);
    const host::Exchange& all = host::exchange(host::Op::kMmaTf32, &mine, sizeof mine, nullptr, 0);
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    host::statistics().mma += lane == 0;
    for (int i = 0; i < 4; ++i) {
        const int upper = i / 2, column = 2 * t + i % 2; // row g + 8 upper
        float row[8], col[8];
        for (int k = 0; k < 8; ++k) {
            row[k] = tf32_operand(operands_of(all, 4 * g + k % 4).a[upper + 2 * (k / 4)]);
            col[k] = tf32_operand(operands_of(all, 4 * column + k % 4).b[k / 4]);
        }
        d[i] = host::accumulate_tf32(d[i], row, col);
    }
}

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Operands mine;
    std::memcpy(mine.a, a, sizeof mine.a);
    std::memcpy(mine.b, b, sizeof mine.b);
    const host::Exchange& all = host::exchange(host::Op::kMmaBf16, &mine, sizeof mine, nullptr, 0);
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    host::statistics().mma += lane == 0;
    for (int i = 0; i < 4; ++i) {
        const int upper = i / 2, column = 2 * t + i % 2;
        float row[16], col[16];
        for (int k = 0; k < 16; ++k) {
            const int owner = k % 8 / 2;
            row[k] = half_of(operands_of(all, 4 * g + owner).a[upper + 2 * (k / 8)], k % 2);
            col[k] = half_of(operands_of(all, 4 * column + owner).b[k / 8], k % 2);
        }
        d[i] = host::accumulate_bf16(d[i], row, col);
    }
}

namespace host {

float accumulate_tf32(float c, const float (&a)[8], const float (&b)[8]) {
    for (int k = 0; k < 8; k += kTf32Group) c = accumulate<kTf32Group>(c, a + k, b + k);
    return c;
}
float accumulate_bf16(float c, const float (&a)[16], const float (&b)[16]) {
    for (int k = 0; k < 16; k += kBf16Group) c = accumulate<kBf16Group>(c, a + k, b + k);
    return c;
}

void wgmma(float* d, int columns, bool add, bool transposed, const uint32_t* a, uint64_t b) {
    const Exchange& all = exchange(Op::kWgmma, a, 16, nullptr, columns * 2 + transposed);
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    const unsigned char* const first = shared_base() + int64_t(b & 0x3fff) * 16;
    const int64_t along_k = int64_t(b >> 16 & 0x3fff) * 16, along_n = int64_t(b >> 32 & 0x3fff) * 16;
    if (b >> 46) throw std::runtime_error("wgmma_bf16: a descriptor with swizzling or a base offset");
    float rows[2][16];
    for (int upper = 0; upper < 2; ++upper)
        for (int k = 0; k < 16; ++k)
            rows[upper][k] = half_of(operands_of(all, 4 * g + k % 8 / 2).a[upper + 2 * (k / 8)], k % 2);
    float* const sums = wgmma_accumulator(d, columns / 2, add);
    for (int tile = 0; tile < columns / 8; ++tile)
        for (int i = 0; i < 2; ++i) {
            const int n = 2 * t + i; // of the tile
            float column[16];
            for (int k = 0; k < 16; ++k) {
                const unsigned char* matrix = first + k / 8 * along_k + tile * along_n;
                if (k % 8 == 0) check_shared(matrix, 128, 16, "wgmma_bf16");
                uint16_t element;
                std::memcpy(&element, matrix + (transposed ? k % 8 * 16 + n * 2 : n * 16 + k % 8 * 2), sizeof element);
                column[k] = from_bf16(element);
            }
            for (int upper = 0; upper < 2; ++upper) {
                float& sum = sums[4 * tile + 2 * upper + i];
                sum = accumulate_bf16(sum, rows[upper], column);
            }
        }
}

namespace {

// The last lane reads all rows, so that no lane can be past the instruction and write to them. n_matrices < 0:
// transposed.
void read_rows(Exchange& all, int variant) {
    const bool transposed = variant < 0;
    const int n_matrices = transposed ? -variant : variant;
    for (int j = 0; j < n_matrices; ++j) {
        uint16_t matrix[8][8];
        const unsigned char* rows[8];
        for (int i = 0; i < 8; ++i) {
            std::memcpy(&rows[i], all.in[8 * j + i], sizeof rows[i]);
            check_shared(rows[i], 16, 16, "ldmatrix");
            std::memcpy(matrix[i], rows[i], 16);
        }
        int wavefronts = 1;
        for (int i = 0; i < 8; ++i) {
            int same_banks = 1;
            for (int k = 0; k < i; ++k) same_banks += rows[k] != rows[i] && (rows[k] - rows[i]) % 128 == 0;
            wavefronts = same_banks > wavefronts ? same_banks : wavefronts;
        }
        statistics().ldmatrix += 1;
        statistics().ldmatrix_wavefronts += wavefronts;
        for (int lane = 0; lane < kWarp; ++lane) {
            const int g = lane / 4, t = lane % 4;
            const uint16_t low = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
            const uint16_t high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
            const uint32_t pair = uint32_t(low) | uint32_t(high) << 16;
            std::memcpy(all.out[lane] + 4 * j, &pair, sizeof pair);
        }
    }
}

} // namespace

void ldmatrix(uint32_t* r, int n_matrices, bool transposed, const void* row) {
    const Exchange& all = exchange(transposed ? Op::kLdmatrixTrans : Op::kLdmatrix, &row, sizeof row, &read_rows,
                                   transposed ? -n_matrices : n_matrices);
    std::memcpy(r, all.out[lane_index()], sizeof(uint32_t) * size_t(n_matrices));
}

} // namespace host
} // namespace cuda
} // namespace jlebm
