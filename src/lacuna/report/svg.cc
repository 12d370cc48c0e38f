#include "lacuna/report/svg.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace lacuna::report {
namespace {

constexpr double kWidth = 760, kHeight = 300, kLeft = 64, kRight = 16, kTop = 36, kBottom = 46;
constexpr const char* kColors[] = {"#2563eb", "#dc2626", "#059669",
                                   "#d97706", "#7c3aed", "#0891b2"};

struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();
  void include(double value) { low = std::min(low, value), high = std::max(high, value); }
};

/// A step of 1, 2 or 5 times a power of ten that gives about five ticks.
double tick_step(const Range& range) {
  const double raw = std::max((range.high - range.low) / 5, 1e-12);
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  for (double factor : {1.0, 2.0, 5.0})
    if (raw <= factor * power) return factor * power;
  return 10 * power;
}

void widen(Range& range) {
  if (range.high > range.low) return;
  const double pad = std::max(std::abs(range.high) * 0.5, 0.5);
  range.low -= pad, range.high += pad;
}

std::vector<Series> with_log_y(std::vector<Series> series) {
  for (Series& s : series) {
    std::erase_if(s.points, [](const Point& p) { return !(p.y > 0) || !std::isfinite(p.y); });
    for (Point& p : s.points) p.y = std::log10(p.y);
  }
  return series;
}

/// To three digits, for a tick between two powers of ten.
double rounded(double value) {
  const double unit = std::pow(10.0, std::floor(std::log10(value)) - 2);
  return std::round(value / unit) * unit;
}

}  // namespace

std::string escape(std::string_view text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string xy_chart(const Axes& axes, const std::vector<Series>& given) {
  const std::vector<Series> series = axes.log_y ? with_log_y(given) : given;
  Range xs, ys;
  for (const Series& s : series)
    for (const Point& p : s.points) xs.include(p.x), ys.include(p.y);
  if (!(xs.low <= xs.high)) return "";
  if (axes.y_from_zero && !axes.log_y) ys.include(0.0);
  widen(xs), widen(ys);
  ys.high += (ys.high - ys.low) * 0.06;
  if (!axes.lines) {  // room beside the outermost points
    const double margin = (xs.high - xs.low) * 0.06;
    xs.low -= margin, xs.high += margin;
  }
  const double plot_width = kWidth - kLeft - kRight, plot_height = kHeight - kTop - kBottom;
  const auto px = [&](double x) { return kLeft + (x - xs.low) / (xs.high - xs.low) * plot_width; };
  const auto py = [&](double y) {
    return kTop + (1 - (y - ys.low) / (ys.high - ys.low)) * plot_height;
  };

  std::string out = fmt::format(
      "<svg viewBox=\"0 0 {0} {1}\" role=\"img\" aria-label=\"{2}\"><text class=\"title\" "
      "x=\"{3}\" "
      "y=\"18\">{2}</text>\n",
      kWidth, kHeight, escape(axes.title), kLeft);
  const double dx = tick_step(xs), dy = tick_step(ys);
  for (double x = std::ceil(xs.low / dx) * dx; x <= xs.high + dx * 1e-9; x += dx)
    out += fmt::format(
        "<line class=\"grid\" x1=\"{0:.1f}\" x2=\"{0:.1f}\" y1=\"{1}\" y2=\"{2}\"/><text "
        "x=\"{0:.1f}\" "
        "y=\"{3}\" text-anchor=\"middle\">{4:g}</text>\n",
        px(x), kTop, kHeight - kBottom, kHeight - kBottom + 16, std::abs(x) < dx * 1e-9 ? 0.0 : x);
  for (double y = std::ceil(ys.low / dy) * dy; y <= ys.high + dy * 1e-9; y += dy)
    out += fmt::format(
        "<line class=\"grid\" x1=\"{1}\" x2=\"{2}\" y1=\"{0:.1f}\" y2=\"{0:.1f}\"/><text x=\"{3}\" "
        "y=\"{4:.1f}\" text-anchor=\"end\">{5:g}</text>\n",
        py(y), kLeft, kWidth - kRight, kLeft - 6, py(y) + 4,
        axes.log_y                ? rounded(std::pow(10.0, y))
        : std::abs(y) < dy * 1e-9 ? 0.0
                                  : y);
  out += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
                     kLeft + plot_width / 2, kHeight - 10, escape(axes.x));
  out += fmt::format(
      "<text transform=\"translate(14 {}) rotate(-90)\" text-anchor=\"middle\">{}</text>\n",
      kTop + plot_height / 2, escape(axes.y));

  double legend = kWidth - kRight;
  for (size_t i = series.size(); i-- > 0;) {
    const char* color = kColors[i % std::size(kColors)];
    legend -= 7.0 * static_cast<double>(series[i].name.size()) + 24;
    out += fmt::format(
        "<circle cx=\"{:.1f}\" cy=\"14\" r=\"4\" fill=\"{}\"/><text x=\"{:.1f}\" "
        "y=\"18\">{}</text>\n",
        legend, color, legend + 8, escape(series[i].name));
  }
  for (size_t i = 0; i < series.size(); ++i) {
    const char* color = kColors[i % std::size(kColors)];
    if (axes.lines && series[i].points.size() > 1) {
      out += fmt::format("<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"1.5\" points=\"",
                         color);
      for (const Point& p : series[i].points)
        out += fmt::format("{:.1f},{:.1f} ", px(p.x), py(p.y));
      out += "\"/>\n";
    }
    for (const Point& p : series[i].points) {
      out += fmt::format(
          "<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"{}\" fill=\"{}\"><title>{}</title></circle>\n",
          px(p.x), py(p.y), axes.lines ? 2.5 : 6.0, color,
          escape(fmt::format("{}{}({:g}, {:g})", p.label, p.label.empty() ? "" : ": ", p.x,
                             axes.log_y ? std::pow(10.0, p.y) : p.y)));
    }
  }
  return out + "</svg>\n";
}

std::string standalone(const std::string& chart) {
  constexpr std::string_view kTag = "<svg ";
  if (!chart.starts_with(kTag)) return "";
  return std::string(kTag) + "xmlns=\"http://www.w3.org/2000/svg\" " +
         chart.substr(kTag.size(), chart.find('>') + 1 - kTag.size()) +
         "<style>svg{background:#fff}text{font:12px system-ui,sans-serif;fill:#222}"
         ".title{font-weight:600}.grid{stroke:#8884}</style>" +
         chart.substr(chart.find('>') + 1);
}

}  // namespace lacuna::report
