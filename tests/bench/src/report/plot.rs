//! Pictures: lines over a few categories.

use std::ops::Range;
use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

const SIZE: (u32, u32) = (860, 460);

/// Lines over categories.
pub struct Chart {
    /// What the categories are.
    pub across: &'static str,
    /// What the numbers are.
    pub up: &'static str,
    /// From left to right.
    pub categories: Vec<String>,
    /// Each line, with a number for each category where there is one.
    pub lines: Vec<(String, Vec<Option<f64>>)>,
}

impl Chart {
    /// From zero, or from the bottom of what is negative, to a little above the highest number.
    fn range(&self) -> Range<f64> {
        let values = || self.lines.iter().flat_map(|(_, line)| line).flatten();
        let top = values().copied().fold(0.0, f64::max);
        let bottom = values().copied().fold(0.0, f64::min);
        let room = if top > bottom { top - bottom } else { 1.0 };
        bottom..top + room * 0.08
    }
}

/// Writes it as SVG.
///
/// # Errors
/// When it can't be written.
pub fn draw(chart: &Chart, title: &str, path: &Path) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| anyhow!("cannot draw {}: {error}", path.display());
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(|error| failed(&error))?;
    let last = i32::try_from(chart.categories.len())?;
    let mut canvas = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(-0.5..f64::from(last) - 0.5, chart.range())
        .map_err(|error| failed(&error))?;
    let category = |at: &f64| {
        let index = (0..last).find(|index| (f64::from(*index) - at).abs() < 0.01);
        let index = index.and_then(|index| usize::try_from(index).ok());
        index.map_or_else(String::new, |index| chart.categories[index].clone())
    };
    canvas
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(chart.categories.len() * 2 + 1)
        .x_label_formatter(&category)
        .x_desc(chart.across)
        .y_desc(chart.up)
        .draw()
        .map_err(|error| failed(&error))?;
    for (index, (name, line)) in chart.lines.iter().enumerate() {
        let color = Palette99::pick(index).to_rgba();
        let points: Vec<(f64, f64)> = (0..last)
            .map(f64::from)
            .zip(line)
            .filter_map(|(at, value)| value.map(|value| (at, value)))
            .collect();
        canvas
            .draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))
            .map_err(|error| failed(&error))?
            .label(name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 14, y + 4)], color.filled()));
        let dots = points
            .into_iter()
            .map(|point| Circle::new(point, 4, color.filled()));
        canvas.draw_series(dots).map_err(|error| failed(&error))?;
    }
    canvas
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()
        .map_err(|error| failed(&error))?;
    area.present().map_err(|error| failed(&error))
}
