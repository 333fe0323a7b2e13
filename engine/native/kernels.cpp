// A decoder layer on CPU: the C interface that engine.native.library calls. Needs AVX-512F and BW; bfloat16 products are
// one instruction where the processor has AVX512-BF16, and made of float32 ones where not.
//
// A call computes one layer, or the logits, with the team that it is given.
#include <memory>

#include "attention.h"
#include "elementwise.h"
#include "product.h"
#include "team.h"
#include "tile.h"

namespace baton {

extern "C" {

// Mirrored by engine.native.library: same order, same types.
struct Shape {
    int32_t hidden, intermediate, heads, kv_heads, head_dim, page_size;
    float epsilon, scale;
};

struct LayerWeights {
    const void *attention_norm, *query_key_value, *query_key_value_bias, *query_key_norm, *output, *output_bias;
    const void *mlp_norm, *gate_up, *gate_up_bias, *down, *down_bias;
    void* cache;
    int32_t window;
};

struct Step {
    int32_t rows, spans;
    const Span* span;
    const int32_t* pages;
    int64_t page_stride, head_stride;
    const float *cosine, *sine;  // [rows, head_dim / 2]
    const int32_t* slots;        // [rows, 2]: page, and offset in it, of each row's key and value
    void *hidden, *normed, *query_key_value, *attended, *activated;
    // Of a rank with a part of the weights: its share of what is to be added to `hidden`. Else nullptr: it is added here.
    void* share;
};

// logits [rows, outputs] = norm(hidden [rows, inputs]) times packed weights. Normalizes `hidden` in place.
struct Head {
    int32_t rows, inputs, outputs;
    float epsilon;
    void* hidden;
    const void *norm, *packed;
    float* logits;
};

}  // extern "C"

namespace {

template <class Type>
using Element = typename Type::Element;

// Sums of a product and where they go: a bias is added, a residual too, and the columns behind `columns` are dropped.
template <class Type>
struct StoreRows {
    Element<Type>* to;
    const Element<Type>* bias;
    bool add;  // to what is there
    int columns;

    template <int PANELS>
    void operator()(int row, int panel, const __m512 (&sums)[PANELS]) const {
        for (int at = 0; at < PANELS; ++at) {
            const int column = (panel + at) * LANES;
            const __mmask16 lanes = lanes_of(columns - column);
            Element<Type>* target = to + static_cast<int64_t>(row) * columns + column;
            __m512 value = sums[at];
            if (bias) value = _mm512_add_ps(value, Type::load(bias + column, lanes));
            if (add) value = _mm512_add_ps(value, Type::load(target, lanes));
            Type::store(target, value, lanes);
        }
    }
};

struct StoreFloats {
    float* to;
    int columns;

    template <int PANELS>
    void operator()(int row, int panel, const __m512 (&sums)[PANELS]) const {
        for (int at = 0; at < PANELS; ++at) {
            const int column = (panel + at) * LANES;
            _mm512_mask_storeu_ps(to + static_cast<int64_t>(row) * columns + column, lanes_of(columns - column), sums[at]);
        }
    }
};

// Gate and up panels come in turns; so do their biases.
template <class Type>
struct ActivateRows {
    Element<Type>* to;
    const Element<Type>* bias;
    int columns;

    template <int PANELS>
    void operator()(int row, int panel, const __m512 (&sums)[PANELS]) const {
        if constexpr (PANELS % 2 == 0)
            for (int at = 0; at < PANELS; at += 2) {
                const int column = (panel + at) / 2 * LANES;
                __m512 gate = sums[at], up = sums[at + 1];
                if (bias) {
                    gate = _mm512_add_ps(gate, Type::load(bias + (panel + at) * LANES));
                    up = _mm512_add_ps(up, Type::load(bias + (panel + at + 1) * LANES));
                }
                Type::store(to + static_cast<int64_t>(row) * columns + column, silu_and_multiply(gate, up),
                            lanes_of(columns - column));
            }
    }
};

inline int panels_of(int columns) { return (columns + LANES - 1) / LANES; }

template <class Type>
int words_of(int columns) {
    return columns / Type::PER_WORD;
}

template <class Type>
Rows rows_of(const void* from, int columns, int count) {
    return {static_cast<const Word*>(from), words_of<Type>(columns), count};
}

template <class Type>
class Layer {
   public:
    Layer(const Shape& shape, const LayerWeights& weights, const Step& step, Team& team)
        : shape_(shape),
          weights_(weights),
          step_(step),
          team_(team),
          cache_{static_cast<Element<Type>*>(weights.cache), step.page_stride, step.head_stride, step.pages,
                 shape.page_size, shape.head_dim},
          query_width_(shape.heads * shape.head_dim),
          width_((shape.heads + 2 * shape.kv_heads) * shape.head_dim) {}

    // Called by every member of the team, as are its two halves.
    void compute(int member) const {
        mix(member);
        team_.barrier();
        transform(member);
    }

    // Attention: from `hidden` to what it adds.
    void mix(int member) const {
        normalize_rows(weights_.attention_norm, member);
        team_.barrier();
        product(step_.normed, shape_.hidden, weights_.query_key_value, width_, 1, member,
                StoreRows<Type>{qkv(), elements(weights_.query_key_value_bias), false, width_});
        team_.barrier();
        place_rows(member);
        team_.barrier();
        attend_all();
        team_.barrier();
        product(step_.attended, query_width_, weights_.output, shape_.hidden, 1, member, sum(weights_.output_bias));
    }

    // The MLP: from `hidden` to what it adds.
    void transform(int member) const {
        normalize_rows(weights_.mlp_norm, member);
        team_.barrier();
        product(step_.normed, shape_.hidden, weights_.gate_up, 2 * panels_of(shape_.intermediate) * LANES, 2, member,
                ActivateRows<Type>{static_cast<Element<Type>*>(step_.activated), elements(weights_.gate_up_bias),
                                   shape_.intermediate});
        team_.barrier();
        product(step_.activated, shape_.intermediate, weights_.down, shape_.hidden, 1, member, sum(weights_.down_bias));
    }

   private:
    Element<Type>* hidden() const { return static_cast<Element<Type>*>(step_.hidden); }
    static const Element<Type>* elements(const void* from) { return static_cast<const Element<Type>*>(from); }

    // Where the products go that are added to `hidden`.
    StoreRows<Type> sum(const void* bias) const {
        auto* share = static_cast<Element<Type>*>(step_.share);
        return {share ? share : hidden(), elements(bias), !share, shape_.hidden};
    }

    Element<Type>* qkv() const { return static_cast<Element<Type>*>(step_.query_key_value); }

    template <class Finish>
    void product(const void* from, int inputs, const void* packed, int outputs, int group, int member,
                 const Finish& finish) const {
        multiply<Type>(rows_of<Type>(from, inputs, step_.rows),
                       Panels{static_cast<const Word*>(packed), words_of<Type>(inputs)},
                       share_of(panels_of(outputs), group, member, team_.size()), finish);
    }

    void normalize_rows(const void* weight, int member) const {
        const auto [begin, end] = share_of(step_.rows, 1, member, team_.size());
        for (int row = begin; row < end; ++row) {
            const int64_t at = static_cast<int64_t>(row) * shape_.hidden;
            normalize<Type>(static_cast<Element<Type>*>(step_.normed) + at, hidden() + at,
                            static_cast<const Element<Type>*>(weight), shape_.hidden, shape_.epsilon);
        }
    }

    // Norms and rotates queries and keys; keys and values go to their pages.
    void place_rows(int member) const {
        const int head_dim = shape_.head_dim;
        const auto* norm = static_cast<const Element<Type>*>(weights_.query_key_norm);
        const auto [begin, end] = share_of(step_.rows, 1, member, team_.size());
        for (int row = begin; row < end; ++row) {
            Element<Type>* heads = qkv() + static_cast<int64_t>(row) * width_;
            const int64_t angle = static_cast<int64_t>(row) * (head_dim / 2);
            for (int head = 0; head < shape_.heads + shape_.kv_heads; ++head) {
                Element<Type>* vector = heads + head * head_dim;
                if (norm) normalize<Type>(vector, vector, norm + head * head_dim, head_dim, shape_.epsilon);
                rotate<Type>(vector, step_.cosine + angle, step_.sine + angle, head_dim);
            }
            store(heads + query_width_, step_.slots[2 * row], step_.slots[2 * row + 1]);
        }
    }

    void store(const Element<Type>* keys, int page, int offset) const {
        const int head_dim = shape_.head_dim;
        const int64_t values = static_cast<int64_t>(shape_.kv_heads) * head_dim;
        for (int head = 0; head < shape_.kv_heads; ++head) {
            Element<Type>* key =
                cache_.base + page * step_.page_stride + head * step_.head_stride + static_cast<int64_t>(offset) * head_dim;
            std::memcpy(key, keys + head * head_dim, head_dim * sizeof(Element<Type>));
            std::memcpy(key + cache_.value_offset(), keys + values + head * head_dim, head_dim * sizeof(Element<Type>));
        }
    }

    int block_tokens() const { return std::max(1, BLOCK_ROWS / (shape_.heads / shape_.kv_heads)); }

    void attend_all() const {
        int tasks = 0;
        for (int index = 0; index < step_.spans; ++index) tasks += blocks_of(step_.span[index]) * shape_.kv_heads;
        static thread_local std::unique_ptr<QueryBlock<Type>> block = std::make_unique<QueryBlock<Type>>();
        // Blocks differ in how many keys they see: whoever is done takes the next.
        for (int task = team_.next_task(); task < tasks; task = team_.next_task()) attend(*block, task);
    }

    int blocks_of(const Span& span) const { return (span.stop - span.start + block_tokens() - 1) / block_tokens(); }

    void attend(QueryBlock<Type>& block, int task) const {
        const Span* span = step_.span;
        while (task >= blocks_of(*span) * shape_.kv_heads) task -= blocks_of(*span++) * shape_.kv_heads;
        const int head = task % shape_.kv_heads;
        const int start = span->start + task / shape_.kv_heads * block_tokens();
        const int stop = std::min(span->stop, start + block_tokens());
        const int group = shape_.heads / shape_.kv_heads;
        const int64_t row = span->row + start - span->start;
        const AttentionShape attention{group, weights_.window, shape_.scale};
        block.begin(qkv() + row * width_ + head * group * shape_.head_dim, width_, start, stop, group, shape_.head_dim);
        const int oldest = attention.window ? std::max(0, start - attention.window + 1) : 0;
        for (int key = oldest / BLOCK_KEYS * BLOCK_KEYS; key < stop; key += BLOCK_KEYS)
            block.see(cache_, *span, head, key, stop, attention);
        block.finish(static_cast<Element<Type>*>(step_.attended) + row * query_width_ + head * group * shape_.head_dim,
                     query_width_);
    }

    const Shape& shape_;
    const LayerWeights& weights_;
    const Step& step_;
    Team& team_;
    const LayerCache<Type> cache_;
    const int query_width_, width_;
};

template <class Type>
void compute_layer(Team& team, const Shape& shape, const LayerWeights& weights, const Step& step,
                   void (Layer<Type>::*part)(int) const) {
    const Layer<Type> layer(shape, weights, step, team);
    team.run([&](int member) { (layer.*part)(member); });
}

template <class Type>
void compute_logits(Team& team, const Head& head) {
    team.run([&](int member) {
        const auto [begin, end] = share_of(head.rows, 1, member, team.size());
        for (int row = begin; row < end; ++row) {
            auto* hidden = static_cast<Element<Type>*>(head.hidden) + static_cast<int64_t>(row) * head.inputs;
            normalize<Type>(hidden, hidden, static_cast<const Element<Type>*>(head.norm), head.inputs, head.epsilon);
        }
        team.barrier();
        multiply<Type>(rows_of<Type>(head.hidden, head.inputs, head.rows),
                       Panels{static_cast<const Word*>(head.packed), words_of<Type>(head.inputs)},
                       share_of(panels_of(head.outputs), 1, member, team.size()),
                       StoreFloats{head.logits, head.outputs});
    });
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED Team* baton_team_create(int threads, const int* cores) { return new Team(threads, cores); }

EXPORTED void baton_team_destroy(Team* team) { delete team; }

// baton_layer_float32 and so on: a whole layer, or one half of it.
#define EXPORT_LAYER(NAME, TYPE, PART)                                                                               \
    EXPORTED void NAME(Team* team, const Shape* shape, const LayerWeights* weights, const Step* step) {              \
        compute_layer<TYPE>(*team, *shape, *weights, *step, &Layer<TYPE>::PART);                                     \
    }

EXPORT_LAYER(baton_layer_float32, Float32, compute)
EXPORT_LAYER(baton_layer_bfloat16, BFloat16, compute)
EXPORT_LAYER(baton_mix_float32, Float32, mix)
EXPORT_LAYER(baton_mix_bfloat16, BFloat16, mix)
EXPORT_LAYER(baton_transform_float32, Float32, transform)
EXPORT_LAYER(baton_transform_bfloat16, BFloat16, transform)

EXPORTED void baton_logits_float32(Team* team, const Head* head) { compute_logits<Float32>(*team, *head); }

EXPORTED void baton_logits_bfloat16(Team* team, const Head* head) { compute_logits<BFloat16>(*team, *head); }

}  // namespace baton
