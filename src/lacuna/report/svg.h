// Small charts as inline SVG: no script, no network, readable in light and dark.
#pragma once

#include <string>
#include <vector>

namespace lacuna::report {

/// Escapes text for HTML and SVG.
std::string escape(std::string_view text);

struct Point {
  double x = 0, y = 0;
  std::string label;
};

/// One curve or cloud.
struct Series {
  std::string name;
  std::vector<Point> points;
};

struct Axes {
  std::string title, x, y;
  bool lines = false;  ///< connect the points of a series
  bool y_from_zero = true;
  bool log_y = false;  ///< y in powers of ten; then not from zero, and only what lies above it
};

/// A chart of points (or lines) with axes, ticks, a legend and a hover text a point. Empty when
/// there is no point.
std::string xy_chart(const Axes& axes, const std::vector<Series>& series);

/// A chart as a file of its own: what a page's style would say is in it. Empty when it is.
std::string standalone(const std::string& chart);

}  // namespace lacuna::report
