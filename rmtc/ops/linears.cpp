// Linear maps of a group of cells of a few rows each, out = x @ weight^T (+ residual), by weights as modules hold them.
//
// Each weight is read from memory once, as a scalar that multiplies vectors of rows. x is transposed for that, which
// costs little. A tile of columns goes over all rows of a cell while its weights are in the cache. It prefetches the
// weights of the next tile: they are one stream per column, and the hardware notices too late that each goes on.

#include <algorithm>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#if defined(__AVX512VL__)  // 32 registers
constexpr int BYTES = 32, COLUMNS = 8, VECTORS = 3;
#elif defined(__AVX2__)
constexpr int BYTES = 32, COLUMNS = 4, VECTORS = 3;
#elif defined(__aarch64__)
constexpr int BYTES = 16, COLUMNS = 8, VECTORS = 3;
#else
constexpr int BYTES = 16, COLUMNS = 4, VECTORS = 3;
#endif
constexpr int64_t BLOCK = 64;  // columns of a unit of work, the same number as in linears.py
constexpr int64_t RUN = 256;   // products that are summed before their sum is added to that of the runs before
constexpr int LINE = 64;       // bytes of a cache line

// A tensor of cells and rows, with the elements between the starts of neighbouring ones. A row is contiguous.
template <typename T>
struct Rows {
    T* data;
    int64_t cell, row;

    T* at(int64_t g, int64_t t) const { return data ? data + g * cell + t * row : nullptr; }
};

template <typename T>
struct Map {
    typedef T Vector __attribute__((vector_size(BYTES), aligned(sizeof(T))));
    static constexpr int LANES = BYTES / sizeof(T), STRIP = VECTORS * LANES, AHEAD = LINE / sizeof(T);
    static_assert(LANES <= 8, "linears.py gives scratch memory for no more");

    Rows<const T> x, weight, residual;
    Rows<T> out;
    int64_t cells, rows, size, results;

    static int64_t padded(int64_t rows) { return (rows + LANES - 1) / LANES * LANES; }

    // Transpose x strip by strip: element k of each row of a strip, padded with zeros to whole vectors.
    void turn(int64_t g, T* turned) const {
        for (int64_t first = 0; first < rows; first += STRIP) {
            const int64_t count = std::min<int64_t>(rows - first, STRIP), width = padded(count);
            for (int64_t from = 0; from < size; from += AHEAD) {
                const int64_t to = std::min<int64_t>(size, from + AHEAD);
                for (int64_t t = 0; t < width; t++) {
                    const T* row = x.at(g, first + std::min(t, count - 1));
                    for (int64_t k = from; k < to; k++) turned[k * width + t] = t < count ? row[k] : T(0);
                }
            }
            turned += width * size;
        }
    }

    // Compute a tile: `columns` columns from `column` on, of a strip of `vectors` vectors of rows.
    template <int columns, int vectors>
    void tile(int64_t g, int64_t column, int64_t first, int64_t count, const T* turned) const {
        const T* matrix = weight.at(g, column);
        const Vector* lanes = reinterpret_cast<const Vector*>(turned);
        Vector sums[columns][vectors], found[columns][vectors] = {};
        for (int64_t from = 0; from < size; from += RUN) {
            const int64_t end = std::min(size, from + RUN);
            const auto add = [&](int64_t k) __attribute__((always_inline)) {
                for (int c = 0; c < columns; c++)
                    for (int v = 0; v < vectors; v++)
                        sums[c][v] += lanes[k * vectors + v] * matrix[c * weight.row + k];
            };
            for (auto& each : sums)
                for (auto& sum : each) sum = Vector{};
            int64_t k = from;
            for (; k + AHEAD <= end; k += AHEAD) {
                for (int c = 0; c < columns; c++) __builtin_prefetch(matrix + (columns + c) * weight.row + k);
                for (int next = 0; next < AHEAD; next++) add(k + next);
            }
            for (; k < end; k++) add(k);
            for (int c = 0; c < columns; c++)
                for (int v = 0; v < vectors; v++) found[c][v] += sums[c][v];
        }
        for (int64_t t = 0; t < count; t++) {
            T* to = out.at(g, first + t) + column;
            const T* from = residual.at(g, first + t);
            for (int c = 0; c < columns; c++) {
                const T sum = reinterpret_cast<const T*>(found[c])[t];
                to[c] = from ? from[column + c] + sum : sum;
            }
        }
    }

    template <int columns>
    void tiles(int64_t g, int64_t column, const T* turned) const {
        for (int64_t first = 0; first < rows; first += STRIP) {
            const int64_t count = std::min<int64_t>(rows - first, STRIP), width = padded(count);
            static_assert(VECTORS == 3);
            if (width == 3 * LANES) tile<columns, 3>(g, column, first, count, turned);
            else if (width == 2 * LANES) tile<columns, 2>(g, column, first, count, turned);
            else tile<columns, 1>(g, column, first, count, turned);
            turned += width * size;
        }
    }

    void run(int threads, T* scratch) const {
        const int64_t blocks = (results + BLOCK - 1) / BLOCK;
        #pragma omp parallel num_threads(threads)
        {
            int thread = 0;
            #ifdef _OPENMP
            thread = omp_get_thread_num();
            #endif
            T* turned = scratch + thread * size * padded(rows);
            int64_t last = -1;
            #pragma omp for schedule(static)
            for (int64_t block = 0; block < cells * blocks; block++) {
                const int64_t g = block / blocks, end = std::min(results, (block % blocks + 1) * BLOCK);
                if (g != last) turn(last = g, turned);
                int64_t column = block % blocks * BLOCK;
                for (; column + COLUMNS <= end; column += COLUMNS) tiles<COLUMNS>(g, column, turned);
                for (; column < end; column++) tiles<1>(g, column, turned);
            }
        }
    }
};

}  // namespace

// Each tensor is given by its address and its strides over cells and rows, in elements. The residual may be absent, or
// be where the result is. Each thread needs scratch memory for x of a cell, with rows up to a multiple of the lanes.
#define LINEAR_MAPS(name, T)                                                                                       \
    extern "C" void name(const T* x, int64_t x_cell, int64_t x_row, const T* weight, int64_t weight_cell,          \
                         int64_t weight_row, const T* residual, int64_t residual_cell, int64_t residual_row,       \
                         T* out, int64_t out_cell, int64_t out_row, int64_t cells, int64_t rows, int64_t size,     \
                         int64_t results, int32_t threads, T* scratch) {                                           \
        Map<T>{{x, x_cell, x_row}, {weight, weight_cell, weight_row}, {residual, residual_cell, residual_row},     \
               {out, out_cell, out_row}, cells, rows, size, results}.run(threads, scratch);                        \
    }

LINEAR_MAPS(linear_maps_float32, float)
LINEAR_MAPS(linear_maps_float64, double)
