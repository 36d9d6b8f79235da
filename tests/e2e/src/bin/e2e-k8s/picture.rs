//! The picture: connections of each OAP while the main events happen, one part below the other.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::recording::Recording;

/// The file.
pub const NAME: &str = "placing.svg";
const SIZE: (u32, u32) = (900, 640);
/// Room above the highest line, for the names of the events.
const ROOM: f64 = 1.25;

const FONT: (&str, i32) = ("sans-serif", 15);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws it.
///
/// # Errors
/// When it can't be written.
pub fn draw(recordings: &[Recording], path: &Path) -> Result<()> {
    let drawn = draw_all(recordings, path);
    drawn.map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

/// Puts it into the documentation.
///
/// # Errors
/// When it can't be copied.
pub fn publish(path: &Path) -> Result<()> {
    let to = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../docs")
        .join(NAME);
    fs::copy(path, &to).with_context(|| format!("cannot write {}", to.display()))?;
    Ok(())
}

fn draw_all(recordings: &[Recording], path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let seconds = recordings.iter().map(Recording::seconds);
    let seconds = seconds.fold(1.0, f64::max);
    let points = recordings.iter().flat_map(Recording::lines).flatten();
    let connections = points.map(|(_, connections)| connections);
    let most = connections.fold(1.0, f64::max) * ROOM;
    let parts = area.split_evenly((recordings.len(), 1));
    for (part, recording) in parts.iter().zip(recordings) {
        draw_one(recording, part, (seconds, most))?;
    }
    area.present()?;
    Ok(())
}

/// All parts have the same scales.
fn draw_one(
    recording: &Recording,
    area: &Area<'_>,
    (seconds, most): (f64, f64),
) -> Result<(), Box<dyn std::error::Error>> {
    let whole = |number: &f64| format!("{number:.0}");
    let mut canvas = ChartBuilder::on(area)
        .caption(recording.title, ("sans-serif", 20))
        .margin(10)
        .x_label_area_size(42)
        .y_label_area_size(58)
        .build_cartesian_2d(0.0..seconds, 0.0..most)?;
    canvas
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .label_style(FONT)
        .x_label_formatter(&whole)
        .y_label_formatter(&whole)
        .x_desc("seconds")
        .y_desc("connections of each OAP")
        .draw()?;
    for (index, line) in recording.lines().into_iter().enumerate() {
        let color = Palette99::pick(index).to_rgba();
        canvas.draw_series(LineSeries::new(line, color.stroke_width(2)))?;
    }
    for (index, (at, what)) in recording.marks().iter().enumerate() {
        let foot_and_top = [(*at, 0.0), (*at, most)];
        canvas.draw_series(LineSeries::new(foot_and_top, BLACK.mix(0.35)))?;
        // On two levels: they may be long.
        let height = if index % 2 == 0 { 0.98 } else { 0.91 };
        let place = (*at + seconds * 0.004, most * height);
        canvas.draw_series([Text::new(what.clone(), place, FONT)])?;
    }
    Ok(())
}
