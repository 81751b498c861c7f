// Softmax of rows averaged over members, with statistics, included once for each instruction set
// (isa.h). A bad row (NaN, +inf, or -inf alone) comes out NaN throughout: its sum of exponentials
// is NaN, or 0 with nothing to divide.

#include "cpu/convert_loops.h"
#include "cpu/softmax_row.h"

// The rows of a job in its types.
template <typename T, typename In, typename Out>
struct TypedRows {
  const SoftmaxJob& job;

  int64_t members() const { return static_cast<int64_t>(job.members.size()); }
  T weight(int64_t m) const { return static_cast<T>(job.weights[m]); }
  T log_weight(int64_t m) const { return static_cast<T>(job.log_weights[m]); }
  T inverse_temperature() const { return static_cast<T>(job.inverse_temperature); }
  const In* member(int64_t m, int64_t row) const {
    return static_cast<const In*>(job.members[m].data) + row * job.members[m].stride;
  }
  const T* before(int64_t row) const {
    return job.before == nullptr ? nullptr : static_cast<const T*>(job.before) + row * job.classes;
  }
  Out* out(int64_t row) const { return static_cast<Out*>(job.out) + row * job.classes; }

  // Where the sum of a row grows, `room` unless that can be the output; finish() rounds it there.
  T* sum(int64_t row, T* room) const {
    if constexpr (std::is_same_v<T, Out>) return out(row);
    return room;
  }
  void finish(const T* sum, int64_t row, int64_t n) const {
    if constexpr (!std::is_same_v<T, Out>) from_float(sum, out(row), n);
  }

  // A member's logit of the row's label; NaN if there is no such class.
  T label_logit(int64_t m, int64_t row) const {
    const auto label = static_cast<uint64_t>(job.labels[row]);
    if (label >= static_cast<uint64_t>(job.classes)) return std::numeric_limits<T>::quiet_NaN();
    return static_cast<T>(member(m, row)[label]);
  }
  void add_entropy(int64_t row, double entropy) const {
    static_cast<T*>(job.entropy)[row] += static_cast<T>(entropy);
  }
  // Entropies are sums of terms that rounding may make slightly negative.
  void write_statistics(int64_t row, const MeanSummary<T>& mean, double member_entropy) const {
    const auto at_least_0 = [](double v) { return static_cast<T>(v < 0 ? 0 : v); };
    const bool bad = std::isnan(mean.entropy);
    static_cast<T*>(job.entropy)[row] = at_least_0(mean.entropy);
    static_cast<T*>(job.mutual_information)[row] = at_least_0(mean.entropy - member_entropy);
    static_cast<T*>(job.max_probability)[row] = bad ? static_cast<T>(mean.entropy) : mean.highest;
    job.argmax[row] = bad ? 0 : mean.argmax;
  }
  void write_nll(int64_t row, T log_probability) const {
    static_cast<T*>(job.nll)[row] = -log_probability;
  }
};

// Elements to calculate with: 16-bit ones become fp32 in `room`, others are used where they are.
template <typename T, typename In>
const T* widened(const In* src, T* room, int64_t n) {
  if constexpr (std::is_same_v<T, In>) {
    return src;
  } else {
    to_float(src, room, n);
    return room;
  }
}

constexpr bool wants_entropy(Mode mode) {
  return mode == Mode::sum_and_entropy || mode == Mode::statistics;
}

// Few classes: up to kLanes rows at once, a row to a lane, class c of them at c * kLanes.
template <typename T, typename In, typename Out>
void load_tile(const TypedRows<T, In, Out>& rows, int64_t m, int64_t begin, int64_t count,
               T* tile) {
  T room[kNarrow];
  for (int64_t l = 0; l < count; ++l) {
    const T* row = widened(rows.member(m, begin + l), room, rows.job.classes);
    for (int64_t c = 0; c < rows.job.classes; ++c) tile[c * kLanes<T> + l] = row[c];
  }
}

template <typename T, typename In, typename Out>
void store_tile(const TypedRows<T, In, Out>& rows, int64_t begin, int64_t count, const T* tile) {
  const int64_t C = rows.job.classes;
  T room[kNarrow * kLanes<T>];
  T* to = rows.sum(begin, room);
  for (int64_t l = 0; l < count; ++l) {
    for (int64_t c = 0; c < C; ++c) to[l * C + c] = tile[c * kLanes<T> + l];
  }
  rows.finish(to, begin, count * C);
}

template <typename T>
struct TileSums {
  Vec<T> top, exp, product;
};

// Logits become x, or e^x if wanted.
template <bool kExp, bool kProduct, typename T>
[[gnu::always_inline]] inline TileSums<T> soften_tile(T* tile, int64_t classes,
                                                      T inverse_temperature) {
  constexpr int64_t L = kLanes<T>;
  TileSums<T> sums = {load(tile), {}, {}};
  for (int64_t c = 1; c < classes; ++c) sums.top = larger(load(tile + c * L), sums.top);
  for (int64_t c = 0; c < classes; ++c) {
    const Vec<T> x = (load(tile + c * L) - sums.top) * inverse_temperature;
    const Vec<T> e = exp_of<T>(x);
    store(tile + c * L, kExp ? e : x);
    sums.exp += e;
    if constexpr (kProduct) sums.product = add_product<T>(e, x, sums.product);
  }
  return sums;
}

// The statistics of a tile of rows while members come in.
template <typename T, typename In, typename Out>
struct TileStatistics {
  const TypedRows<T, In, Out>& rows;
  int64_t begin, count;
  Vec<T> member_entropy;
  LogSum<T> label;

  TileStatistics(const TypedRows<T, In, Out>& rows, int64_t begin, int64_t count)
      : rows(rows), begin(begin), count(count), member_entropy{} {}

  [[gnu::always_inline]] void add(int64_t m, const TileSums<T>& sums) {
    const Vec<T> log_sum = log_of<T>(sums.exp);
    member_entropy += rows.weight(m) * entropy_of(log_sum, sums.exp, sums.product);
    if (rows.job.labels == nullptr) return;
    alignas(64) T z[kLanes<T>] = {};
    for (int64_t l = 0; l < count; ++l) z[l] = rows.label_logit(m, begin + l);
    label.add(log_probability(load(z), sums.top, rows.inverse_temperature(), log_sum,
                              rows.log_weight(m)));
  }

  void write(const T* mean) const {
    LaneMaximum<T> maximum;
    Vec<T> entropy = {};
    for (int64_t c = 0; c < rows.job.classes; ++c) {
      const Vec<T> p = load(mean + c * kLanes<T>);
      maximum.take(p, typename Real<T>::Bits{} + static_cast<typename Real<T>::Word>(c));
      entropy -= times_log<T>(p);
    }
    const Vec<T> label_log = label.value();
    for (int64_t l = 0; l < count; ++l) {
      const auto argmax = static_cast<int64_t>(maximum.index[l]);
      rows.write_statistics(begin + l, {entropy[l], maximum.value[l], argmax}, member_entropy[l]);
      if (rows.job.labels != nullptr) rows.write_nll(begin + l, label_log[l]);
    }
  }
};

template <Mode kMode, typename T, typename In, typename Out>
void narrow_rows(const TypedRows<T, In, Out>& rows, int64_t begin, int64_t count) {
  constexpr int64_t L = kLanes<T>;
  const int64_t C = rows.job.classes;
  alignas(64) T tile[kNarrow * L] = {}, total[kNarrow * L] = {};
  TileStatistics<T, In, Out> statistics(rows, begin, count);
  for (int64_t l = 0; l < count && rows.job.before != nullptr; ++l) {
    for (int64_t c = 0; c < C; ++c) total[c * L + l] = rows.before(begin + l)[c];
  }
  for (int64_t m = 0; m < rows.members(); ++m) {
    load_tile(rows, m, begin, count, tile);
    const auto sums = soften_tile<true, wants_entropy(kMode)>(tile, C, rows.inverse_temperature());
    const Vec<T> scale = rows.weight(m) / sums.exp;
    for (int64_t c = 0; c < C; ++c) {
      store(total + c * L, mul_add(load(tile + c * L), scale, load(total + c * L)));
    }
    if constexpr (wants_entropy(kMode)) statistics.add(m, sums);
  }
  store_tile(rows, begin, count, total);
  if constexpr (kMode == Mode::statistics) statistics.write(total);
  if constexpr (kMode == Mode::sum_and_entropy) {
    for (int64_t l = 0; l < count; ++l) {
      rows.add_entropy(begin + l, statistics.member_entropy[l]);
    }
  }
}

template <typename T, typename In, typename Out>
void narrow_log_rows(const TypedRows<T, In, Out>& rows, int64_t begin, int64_t count) {
  constexpr int64_t L = kLanes<T>;
  const int64_t C = rows.job.classes;
  alignas(64) T tile[kNarrow * L] = {};
  LogSum<T> sums[kNarrow];
  for (int64_t m = 0; m < rows.members(); ++m) {
    load_tile(rows, m, begin, count, tile);
    const auto member = soften_tile<false, false>(tile, C, rows.inverse_temperature());
    const Vec<T> offset = rows.log_weight(m) - log_of<T>(member.exp);
    for (int64_t c = 0; c < C; ++c) sums[c].add(load(tile + c * L) + offset);
  }
  for (int64_t c = 0; c < C; ++c) store(tile + c * L, sums[c].value());
  store_tile(rows, begin, count, tile);
}

// The statistics of a row while members come in; label_logs has room for all members.
template <typename T>
struct RowStatistics {
  double member_entropy = 0;
  MeanSummary<T> mean = {};
  T* label_logs = nullptr;
};

template <typename T, typename In, typename Out>
void add_member(const TypedRows<T, In, Out>& rows, int64_t row, int64_t m, T top, T log_sum, T sum,
                T product, RowStatistics<T>& statistics) {
  statistics.member_entropy += rows.weight(m) * entropy_of(log_sum, sum, product);
  if (rows.job.labels == nullptr) return;
  statistics.label_logs[m] = log_probability(
      rows.label_logit(m, row), top, rows.inverse_temperature(), log_sum, rows.log_weight(m));
}

// All members of a row are in `sum`.
template <Mode kMode, typename T, typename In, typename Out>
void finish_row(const TypedRows<T, In, Out>& rows, int64_t row, const T* sum,
                const RowStatistics<T>& statistics) {
  rows.finish(sum, row, rows.job.classes);
  if constexpr (kMode == Mode::sum_and_entropy) rows.add_entropy(row, statistics.member_entropy);
  if constexpr (kMode == Mode::statistics) {
    rows.write_statistics(row, statistics.mean, statistics.member_entropy);
    if (rows.job.labels == nullptr) return;
    rows.write_nll(row, log_sum_exp(statistics.label_logs, rows.members()));
  }
}

// Memory for one thread.
template <typename T>
struct Workspace {
  AlignedArray<T> e;           // kGroupElements, or a row
  AlignedArray<T> room;        // a row
  AlignedArray<T> highest;     // a row, for logarithms
  AlignedArray<T> tops;        // of a row's blocks
  AlignedArray<T> label_logs;  // members of kGroup rows

  explicit Workspace(const SoftmaxJob& job)
      : e(std::max(kGroupElements, padded<T>(job.classes))),
        room(padded<T>(job.classes)),
        highest(job.mode == Mode::log ? padded<T>(job.classes) : 0),
        tops((job.classes + kBlock - 1) / kBlock),
        label_logs(kGroup * padded<T>(static_cast<int64_t>(job.members.size()))) {}
};

// Some members of some rows, a row's members one after the other.
template <typename T>
struct Group {
  int64_t row, num_rows, member, num_members;
  alignas(64) T tops[kGroup], sums[kGroup] = {}, products[kGroup], logs[kGroup], scales[kGroup];

  int64_t count() const { return num_rows * num_members; }
  int64_t row_of(int64_t i) const { return row + i / num_members; }
  int64_t member_of(int64_t i) const { return member + i % num_members; }
};

template <Mode kMode, typename T, typename In, typename Out>
void soften_group(const TypedRows<T, In, Out>& rows, Group<T>& group, T* e) {
  const int64_t C = rows.job.classes, pitch = padded<T>(C);
  for (int64_t i = 0; i < group.count(); ++i) {
    const In* z = rows.member(group.member_of(i), group.row_of(i));
    group.tops[i] = largest(widened(z, e + i * pitch, C), C);
  }
  for (int64_t i = 0; i < group.count(); ++i) {
    const int64_t m = group.member_of(i);
    T* to = e + i * pitch;
    const T* z = to;
    if constexpr (std::is_same_v<T, In>) z = rows.member(m, group.row_of(i));
    const In* ahead = rows.member(m, group.row_of(i) + group.num_rows);
    const Sums<T> sums = exponentials<wants_entropy(kMode)>(
        z, group.tops[i], rows.inverse_temperature(), to, C, ahead);
    group.sums[i] = sums.exp;
    group.products[i] = sums.product;
    group.scales[i] = rows.weight(m) / sums.exp;
  }
}

template <typename T, typename In, typename Out>
void add_group(const TypedRows<T, In, Out>& rows, Group<T>& group, RowStatistics<T>* statistics) {
  for (int64_t i = 0; i < group.count(); i += kLanes<T>) {
    store(group.logs + i, log_of<T>(load(group.sums + i)));
  }
  for (int64_t i = 0; i < group.count(); ++i) {
    const int64_t row = group.row_of(i);
    add_member(rows, row, group.member_of(i), group.tops[i], group.logs[i], group.sums[i],
               group.products[i], statistics[row - group.row]);
  }
}

// Rows of up to kBlock classes, some rows and members at a time: what one waits for (reductions, a
// division) overlaps with the others' work.
template <Mode kMode, typename T, typename In, typename Out>
void grouped_rows(const TypedRows<T, In, Out>& rows, int64_t begin, int64_t end,
                  Workspace<T>& work) {
  const int64_t C = rows.job.classes, pitch = padded<T>(C), M = rows.members();
  const int64_t fitting = std::clamp<int64_t>(kGroupElements / pitch, 1, kGroup);
  const int64_t some_members = std::min(fitting, M);
  const int64_t some_rows = std::max<int64_t>(1, fitting / M);  // 1 if not all members fit
  RowStatistics<T> statistics[kGroup];
  Group<T> group;
  for (group.row = begin; group.row < end; group.row += some_rows) {
    group.num_rows = std::min(some_rows, end - group.row);
    for (int64_t i = 0; i < group.num_rows; ++i) {
      statistics[i] = {.label_logs = work.label_logs.data() + i * padded<T>(M)};
    }
    for (group.member = 0; group.member < M; group.member += some_members) {
      group.num_members = std::min(some_members, M - group.member);
      const bool last = group.member + group.num_members == M;
      soften_group<kMode>(rows, group, work.e.data());
      if constexpr (wants_entropy(kMode)) add_group(rows, group, statistics);
      for (int64_t i = 0; i < group.num_rows; ++i) {
        const int64_t row = group.row + i, first = i * group.num_members;
        T* sum = rows.sum(row, work.room.data());
        const T* before = group.member == 0 ? rows.before(row) : sum;
        MeanSummary<T>* summary = kMode == Mode::statistics && last ? &statistics[i].mean : nullptr;
        combine(before, work.e.data() + first * pitch, pitch, group.scales + first,
                group.num_members, sum, C, 0, summary);
        if (last) finish_row<kMode>(rows, row, sum, statistics[i]);
      }
    }
  }
}

// Sums of e^x for a row whose largest logit is `top`.
template <typename T>
struct RowSums {
  T top = kLowest<T>;
  double exp = 0, product = 0;

  // x of one maximum relative to another, far below it at the least; both may be one infinity.
  static double gap(T top, T highest, T inverse_temperature) {
    if (top == highest) return 0;
    return std::max(-1e4, (static_cast<double>(top) - highest) * inverse_temperature);
  }
  void raise(T highest, T inverse_temperature) {
    const double x = gap(top, highest, inverse_temperature), factor = std::exp(x);
    product = factor * (product + x * exp);
    exp *= factor;
    top = highest;
  }
  void add(RowSums other, T inverse_temperature) {
    const T highest = larger(other.top, top);
    raise(highest, inverse_temperature);
    other.raise(highest, inverse_temperature);
    exp += other.exp;
    product += other.product;
  }
};

// e = e^x for a long row, in blocks: sums of blocks are accurate, and memory is read once, for each
// block keeps its own maximum, in `tops`, until the row's is known.
template <bool kProduct, typename T, typename In>
RowSums<T> soften_row(const In* z, int64_t classes, T inverse_temperature, T* e, T* tops) {
  RowSums<T> row;
  for (int64_t at = 0; at < classes; at += kBlock) {
    const int64_t size = std::min(kBlock, classes - at);
    const T* block = widened(z + at, e + at, size);
    const T top = tops[at / kBlock] = largest(block, size);
    const T origin = top == kLowest<T> ? T(0) : top;  // a block may be masked throughout
    const Sums<T> sums =
        exponentials<kProduct>(block, origin, inverse_temperature, e + at, size, z + at + kBlock);
    row.add({top, sums.exp, sums.product}, inverse_temperature);
  }
  return row;
}

template <Mode kMode, typename T, typename In, typename Out>
void long_row(const TypedRows<T, In, Out>& rows, int64_t row, Workspace<T>& work) {
  const int64_t C = rows.job.classes, M = rows.members();
  const T inverse_temperature = rows.inverse_temperature();
  RowStatistics<T> statistics = {.label_logs = work.label_logs.data()};
  T* sum = rows.sum(row, work.room.data());
  T *e = work.e.data(), *tops = work.tops.data();
  for (int64_t m = 0; m < M; ++m) {
    const RowSums<T> sums =
        soften_row<wants_entropy(kMode)>(rows.member(m, row), C, inverse_temperature, e, tops);
    if constexpr (wants_entropy(kMode)) {
      add_member(rows, row, m, sums.top, static_cast<T>(std::log(sums.exp)),
                 static_cast<T>(sums.exp), static_cast<T>(sums.product), statistics);
    }
    const T* before = m == 0 ? rows.before(row) : sum;
    MeanSummary<T>* summary = kMode == Mode::statistics && m == M - 1 ? &statistics.mean : nullptr;
    for (int64_t at = 0; at < C; at += kBlock) {
      const double factor =
          std::exp(RowSums<T>::gap(tops[at / kBlock], sums.top, inverse_temperature));
      const T scale = static_cast<T>(rows.weight(m) * factor / sums.exp);
      combine(before == nullptr ? nullptr : before + at, e + at, 0, &scale, 1, sum + at,
              std::min(kBlock, C - at), at, summary);
    }
  }
  finish_row<kMode>(rows, row, sum, statistics);
}

// Adds (z - top) / temperature + offset to the sums of logarithms, which reach to whole vectors.
template <typename T>
void add_logs(const T* z, T top, T inverse_temperature, T offset, T* highest, T* sums, int64_t n) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = 0; i < n; i += L) {
    const Vec<T> logits = n - i < L ? load_first(z + i, n - i, top) : load(z + i);
    LogSum<T> log(load(highest + i), load(sums + i));
    log.add((logits - top) * inverse_temperature + offset);
    store(highest + i, log.highest);
    store(sums + i, log.sum);
  }
}

template <typename T, typename In, typename Out>
void log_row(const TypedRows<T, In, Out>& rows, int64_t row, Workspace<T>& work) {
  const int64_t C = rows.job.classes;
  const T inverse_temperature = rows.inverse_temperature();
  T *highest = work.highest.data(), *room = work.room.data(), *e = work.e.data();
  std::fill_n(highest, padded<T>(C), kLowest<T>);
  std::fill_n(room, padded<T>(C), T(0));
  for (int64_t m = 0; m < rows.members(); ++m) {
    const In* z = rows.member(m, row);
    const RowSums<T> sums = soften_row<false>(z, C, inverse_temperature, e, work.tops.data());
    const T offset = rows.log_weight(m) - static_cast<T>(std::log(sums.exp));
    for (int64_t at = 0; at < C; at += kBlock) {
      const int64_t size = std::min(kBlock, C - at);
      add_logs(widened(z + at, e + at, size), sums.top, inverse_temperature, offset, highest + at,
               room + at, size);
    }
  }
  for (int64_t c = 0; c < C; c += kLanes<T>) {
    store(room + c, LogSum<T>(load(highest + c), load(room + c)).value());
  }
  if constexpr (std::is_same_v<T, Out>) {
    std::copy_n(room, C, rows.out(row));
  } else {
    rows.finish(room, row, C);
  }
}

template <Mode kMode, typename T, typename In, typename Out>
void softmax_rows_typed(const SoftmaxJob& job, int64_t begin, int64_t end) {
  const TypedRows<T, In, Out> rows{job};
  if (job.classes <= kNarrow) {
    for (int64_t r = begin; r < end; r += kLanes<T>) {
      const int64_t count = std::min(kLanes<T>, end - r);
      if constexpr (kMode == Mode::log) {
        narrow_log_rows(rows, r, count);
      } else {
        narrow_rows<kMode>(rows, r, count);
      }
    }
    return;
  }
  Workspace<T> work(job);
  if constexpr (kMode == Mode::log) {
    for (int64_t r = begin; r < end; ++r) log_row(rows, r, work);
  } else if (job.classes <= kBlock) {
    grouped_rows<kMode>(rows, begin, end, work);
  } else {
    for (int64_t r = begin; r < end; ++r) long_row<kMode>(rows, r, work);
  }
}

template <typename T, typename In>
void softmax_rows_of(const SoftmaxJob& job, int64_t begin, int64_t end) {
  switch (job.mode) {
    case Mode::mean:
      return softmax_rows_typed<Mode::mean, T, In, In>(job, begin, end);
    case Mode::log:
      return softmax_rows_typed<Mode::log, T, In, In>(job, begin, end);
    case Mode::statistics:
      return softmax_rows_typed<Mode::statistics, T, In, In>(job, begin, end);
    case Mode::sum:
      return softmax_rows_typed<Mode::sum, T, In, T>(job, begin, end);
    case Mode::sum_and_entropy:
      return softmax_rows_typed<Mode::sum_and_entropy, T, In, T>(job, begin, end);
  }
}

inline void softmax_rows(const SoftmaxJob& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case ScalarType::Float:
      return softmax_rows_of<float, float>(job, begin, end);
    case ScalarType::Double:
      return softmax_rows_of<double, double>(job, begin, end);
    case ScalarType::Half:
      return softmax_rows_of<float, c10::Half>(job, begin, end);
    default:
      return softmax_rows_of<float, c10::BFloat16>(job, begin, end);
  }
}
