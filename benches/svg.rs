//! The ratios as a picture (pure): a bar each, floor and stretch as marks.

use std::fmt::Write as _;

use crate::report::{Figure, Report};

/// An SVG document.
pub(crate) fn draw(report: &Report) -> String {
    let ratios: Vec<&Figure> = report.figures.iter().filter(|f| f.unit == "x").collect();
    let widest =
        ratios.iter().flat_map(|f| [f.value, f.high, f.goal.map(|g| g.stretch.max(g.floor))]);
    let widest = widest.flatten().fold(1.0, f64::max);
    let scale = |value: f64| LABEL + value / widest * BARS;
    let height = 40 + ratios.len() * ROW;
    let width = LABEL + BARS + 60.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"18\">Ratios of medians; | floor, || stretch; the grey line is 1</text>\n"
    );
    let line = |x: f64, top: usize, bottom: usize, colour: &str, body: &mut String| {
        let _ = writeln!(
            body,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top}\" y2=\"{bottom}\" stroke=\"{colour}\"/>"
        );
    };
    for (at, figure) in ratios.iter().enumerate() {
        let y = 30 + at * ROW;
        let value = figure.value.unwrap_or(0.0);
        let colour = if figure.verdict() == "BELOW" { "#c0504d" } else { "#4f81bd" };
        let _ = writeln!(
            svg,
            "<text x=\"8\" y=\"{}\">{}</text><rect x=\"{LABEL}\" y=\"{y}\" width=\"{:.1}\" \
             height=\"14\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{}\">{value:.2}</text>",
            y + 12,
            escape(&figure.title),
            scale(value) - LABEL,
            scale(value) + 6.0,
            y + 12,
        );
        if let Some(goal) = figure.goal {
            line(scale(goal.floor), y - 2, y + 16, "black", &mut svg);
            line(scale(goal.stretch) - 1.5, y - 2, y + 16, "black", &mut svg);
            line(scale(goal.stretch) + 1.5, y - 2, y + 16, "black", &mut svg);
        }
    }
    line(scale(1.0), 26, height - 8, "grey", &mut svg);
    svg.push_str("</svg>\n");
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// Pixels for titles.
const LABEL: f64 = 480.0;
/// Pixels for the longest bar.
const BARS: f64 = 500.0;
/// Pixels from bar to bar.
const ROW: usize = 22;
