#include "arguments.h"

#include <c10/util/Exception.h>

namespace sst_fast {

Arguments::Arguments(
    const at::Tensor& embedding, const at::Tensor& prototypes, const OptionalTensor& positive,
    const c10::List<OptionalTensor>& tensors, at::IntArrayRef integers, at::ArrayRef<double> numbers)
    : embedding(embedding), prototypes(prototypes), positive(positive) {
  size_t at = 0;
#define SST_FIELD(name) name = at < tensors.size() ? tensors.get(at) : OptionalTensor(), at++;
  SST_TENSORS(SST_FIELD)
#undef SST_FIELD
  TORCH_CHECK(tensors.size() == at, "margin_softmax: ", at, " optional tensors expected, got ", tensors.size());
  at = 0;
#define SST_FIELD(name) name = at < integers.size() ? integers[at] : 0, at++;
  SST_INTEGERS(SST_FIELD)
#undef SST_FIELD
  TORCH_CHECK(integers.size() == at, "margin_softmax: ", at, " integers expected, got ", integers.size());
  at = 0;
#define SST_FIELD(name) name = at < numbers.size() ? numbers[at] : 0, at++;
  SST_NUMBERS(SST_FIELD)
#undef SST_FIELD
  TORCH_CHECK(
      numbers.size() >= at && numbers.size() <= at + kParameters, "margin_softmax: ", at, " numbers and at most ",
      kParameters, " parameters of the margin expected, got ", numbers.size());
  TORCH_CHECK(kind >= 0 && kind < kKinds, "margin_softmax: unknown margin ", kind);
  TORCH_CHECK(reduction >= 0 && reduction <= 2, "margin_softmax: unknown reduction ", reduction);
  TORCH_CHECK_VALUE(scale_rows || (scale > 0 && scale < 1e30), "scale must be a finite number > 0, got ", scale);
  margin.kind = static_cast<Kind>(kind);
  for (size_t p = at; p < numbers.size(); p++) margin.p[p - at] = numbers[p];
}

Margin Arguments::margin_of(int64_t row) const {
  Margin mine = margin;
  if (margin_rows) {
    const int64_t N = margin_rows->size(1);
    const double* rows = margin_rows->const_data_ptr<double>();
    for (int64_t q = 0; q < margin_rows->size(0); q++) mine.p[q] = rows[q * N + row];
  }
  return mine;
}

double Arguments::scale_of(int64_t row) const { return scale_rows ? scale_rows->const_data_ptr<double>()[row] : scale; }

std::vector<std::vector<std::string>> argument_names() {
#define SST_FIELD(name) #name,
  return {{SST_TENSORS(SST_FIELD)}, {SST_INTEGERS(SST_FIELD)}, {SST_NUMBERS(SST_FIELD)}};
#undef SST_FIELD
}

}  // namespace sst_fast
