// Linear maps of a group of cells of a few rows each, out = x @ weight^T (+ residual), by weights as modules hold them,
// and their gradients of x, out = x @ weight, where x is the gradient of what is mapped.
//
// Each weight is read from memory once, as a scalar that multiplies vectors of rows. x is transposed for that, which
// costs little. A tile of columns goes over the rows of a pass while its weights are in the cache, and so are these
// rows. It prefetches the weights of the next tile: they are one stream per column, and the hardware notices too late
// that each goes on.
// Gradients need columns of the weights: a block of them is copied, tile by tile, and the next block is prefetched.

#include <algorithm>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#if defined(__AVX512F__)  // 32 registers; BLAS may use half as wide ones
constexpr int BYTES = 64, COLUMNS = 8, VECTORS = 3;
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

// The rows of the weight are the columns of the result, or else, for gradients, what is summed over.
template <typename T, bool gradient>
struct Map {
    typedef T Vector __attribute__((vector_size(BYTES), aligned(sizeof(T))));
    static constexpr int LANES = BYTES / sizeof(T), STRIP = VECTORS * LANES, AHEAD = LINE / sizeof(T);
    static_assert(LANES <= 16 && 48 % STRIP == 0, "linears.py counts on that");

    Rows<const T> x, weight, residual;
    Rows<T> out;
    int64_t cells, rows, size, results, pass;

    static int64_t padded(int64_t rows) { return (rows + LANES - 1) / LANES * LANES; }

    // Transpose rows of x strip by strip: element k of each row of a strip, padded with zeros to whole vectors.
    void turn(int64_t g, int64_t begin, int64_t end, T* turned) const {
        for (int64_t first = begin; first < end; first += STRIP) {
            const int64_t count = std::min<int64_t>(end - first, STRIP), width = padded(count);
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

    // Copy columns of the weight, so that element k of those of a tile lie next to one another.
    void copy(int64_t g, int64_t column, int64_t end, T* copied) const {
        for (int64_t k = 0; k < size; k++) {
            const T* row = weight.at(g, k);
            T* to = copied + k * COLUMNS;
            int64_t c = column;
            for (; c + COLUMNS <= end; c += COLUMNS, to += size * COLUMNS) std::copy_n(row + c, COLUMNS, to);
            std::copy(row + c, row + end, to);
        }
    }

    // Return what a tile of the next block, or of the next cell, reads of the first row of a weight: to be prefetched
    // only, for there may be no next one.
    const T* next(int64_t g, int64_t column) const {
        return column + BLOCK < results ? weight.at(g, 0) + column + BLOCK : weight.at(g + 1, 0) + column % BLOCK;
    }

    // Compute a tile: `columns` columns from `column` on, of a strip of `vectors` vectors of rows.
    template <int columns, int vectors>
    void tile(int64_t g, int64_t column, int64_t first, int64_t count, const T* turned, const T* matrix) const {
        const T* ahead = gradient && first == 0 ? next(g, column) : nullptr;
        const Vector* lanes = reinterpret_cast<const Vector*>(turned);
        Vector sums[columns][vectors], found[columns][vectors] = {};
        for (int64_t from = 0; from < size; from += RUN) {
            const int64_t end = std::min(size, from + RUN);
            const auto add = [&](int64_t k) __attribute__((always_inline)) {
                for (int c = 0; c < columns; c++)
                    for (int v = 0; v < vectors; v++)
                        sums[c][v] += lanes[k * vectors + v] * matrix[gradient ? k * COLUMNS + c : c * weight.row + k];
            };
            for (auto& each : sums)
                for (auto& sum : each) sum = Vector{};
            int64_t k = from;
            for (; k + AHEAD <= end; k += AHEAD) {
                if constexpr (!gradient)
                    for (int c = 0; c < columns; c++) __builtin_prefetch(matrix + (columns + c) * weight.row + k);
                else if (ahead)
                    for (int n = 0; n < AHEAD; n++) __builtin_prefetch(ahead + (k + n) * weight.row);
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
    void tiles(int64_t g, int64_t begin, int64_t end, int64_t column, const T* turned, const T* matrix) const {
        for (int64_t first = begin; first < end; first += STRIP) {
            const int64_t count = std::min<int64_t>(end - first, STRIP), width = padded(count);
            static_assert(VECTORS == 3);
            if (width == 3 * LANES) tile<columns, 3>(g, column, first, count, turned, matrix);
            else if (width == 2 * LANES) tile<columns, 2>(g, column, first, count, turned, matrix);
            else tile<columns, 1>(g, column, first, count, turned, matrix);
            turned += width * size;
        }
    }

    void run(int threads, T* scratch) const {
        const int64_t blocks = (results + BLOCK - 1) / BLOCK, passes = (rows + pass - 1) / pass, whole = padded(pass);
        #pragma omp parallel num_threads(threads)
        {
            int thread = 0;
            #ifdef _OPENMP
            thread = omp_get_thread_num();
            #endif
            T* turned = scratch + thread * size * (whole + (gradient ? BLOCK : 0));
            T* copied = turned + size * whole;
            int64_t last = -1;
            #pragma omp for schedule(static)
            for (int64_t block = 0; block < cells * passes * blocks; block++) {
                const int64_t part = block / blocks, g = part / passes;
                const int64_t first = part % passes * pass, stop = std::min(rows, first + pass);
                const int64_t begin = block % blocks * BLOCK, end = std::min(results, begin + BLOCK);
                if (part != last) turn(g, first, stop, turned);
                last = part;
                if (gradient) copy(g, begin, end, copied);
                const auto matrix = [&](int64_t column) -> const T* {
                    const int64_t c = column - begin;
                    return gradient ? copied + c / COLUMNS * COLUMNS * size + c % COLUMNS : weight.at(g, column);
                };
                int64_t column = begin;
                for (; column + COLUMNS <= end; column += COLUMNS)
                    tiles<COLUMNS>(g, first, stop, column, turned, matrix(column));
                for (; column < end; column++) tiles<1>(g, first, stop, column, turned, matrix(column));
            }
        }
    }
};

}  // namespace

// Each tensor is given by its address and its strides over cells and rows, in elements. The residual may be absent, or
// be where the result is. Each thread needs scratch memory for the rows of a pass, up to a multiple of the lanes, and for
// gradients for a block of columns.
#define LINEAR_MAPS(name, T, gradient)                                                                             \
    extern "C" void name(const T* x, int64_t x_cell, int64_t x_row, const T* weight, int64_t weight_cell,          \
                         int64_t weight_row, const T* residual, int64_t residual_cell, int64_t residual_row,       \
                         T* out, int64_t out_cell, int64_t out_row, int64_t cells, int64_t rows, int64_t size,     \
                         int64_t results, int64_t pass, int32_t threads, T* scratch) {                             \
        Map<T, gradient>{{x, x_cell, x_row}, {weight, weight_cell, weight_row},                                    \
                         {residual, residual_cell, residual_row}, {out, out_cell, out_row}, cells, rows, size,     \
                         results, pass}.run(threads, scratch);                                                     \
    }

LINEAR_MAPS(linear_maps_float32, float, false)
LINEAR_MAPS(linear_maps_float64, double, false)
LINEAR_MAPS(linear_gradients_float32, float, true)
LINEAR_MAPS(linear_gradients_float64, double, true)
