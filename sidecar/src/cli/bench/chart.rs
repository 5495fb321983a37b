//! A line chart as SVG: bandwidth over the size of a range.

use std::fmt::Write;

/// One line of the chart.
pub(super) struct Line {
    pub(super) name: String,
    pub(super) dashed: bool,
    /// (Bytes of a range, GB/s), by rising size.
    pub(super) points: Vec<(u64, f64)>,
}

const COLOURS: [&str; 12] = [
    "#15803d", "#1d4ed8", "#b91c1c", "#d97706", "#7c3aed", "#0e7490", "#be185d", "#4b5563",
    "#65a30d", "#0f172a", "#92400e", "#38bdf8",
];
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 440.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 190.0;
const TOP: f64 = 64.0;
const BOTTOM: f64 = 44.0;

/// The chart: sizes by powers of two, bandwidth from 0 on.
pub(super) fn svg(title: &str, caption: &str, lines: &[Line]) -> String {
    let points = || lines.iter().flat_map(|line| &line.points);
    let most = points().map(|(_, gbps)| *gbps).fold(1.0, f64::max) * 1.05;
    let power = |bytes: u64| f64::from(bytes.max(1).ilog2());
    let first = points()
        .map(|(bytes, _)| power(*bytes))
        .fold(f64::INFINITY, f64::min);
    let last = points()
        .map(|(bytes, _)| power(*bytes))
        .fold(first + 1.0, f64::max);
    let x = |bytes: u64| LEFT + (power(bytes) - first) / (last - first) * (WIDTH - LEFT - RIGHT);
    let y = |gbps: f64| HEIGHT - BOTTOM - gbps / most * (HEIGHT - TOP - BOTTOM);

    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>\n\
         <text x=\"16\" y=\"28\" font-size=\"17\" fill=\"#111827\">{}</text>\n\
         <text x=\"16\" y=\"48\" font-size=\"12\" fill=\"#4b5563\">{}</text>\n",
        escaped(title),
        escaped(caption)
    );
    let mut put = |line: std::fmt::Arguments<'_>| {
        // Writing to a string does not fail.
        text.write_fmt(line).unwrap_or_default();
    };
    for share in 0..=4 {
        let gbps = most * f64::from(share) / 4.0;
        let at = y(gbps);
        put(format_args!(
            "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\" stroke=\"#e5e7eb\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" font-size=\"11\" fill=\"#4b5563\" text-anchor=\"end\">{gbps:.0}</text>\n",
            WIDTH - RIGHT,
            LEFT - 8.0,
            at + 4.0
        ));
    }
    let mut sizes: Vec<u64> = points().map(|(bytes, _)| *bytes).collect();
    sizes.sort_unstable();
    sizes.dedup();
    for bytes in sizes {
        put(format_args!(
            "<text x=\"{:.1}\" y=\"{:.1}\" font-size=\"11\" fill=\"#4b5563\" text-anchor=\"middle\">{} KiB</text>\n",
            x(bytes),
            HEIGHT - BOTTOM + 20.0,
            bytes >> 10
        ));
    }
    for (number, line) in lines.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let dashes = if line.dashed {
            " stroke-dasharray=\"5 4\""
        } else {
            ""
        };
        let path: Vec<String> = line
            .points
            .iter()
            .map(|&(bytes, gbps)| format!("{:.1},{:.1}", x(bytes), y(gbps)))
            .collect();
        let at = TOP + 18.0 * f64::from(u32::try_from(number).unwrap_or(0));
        let from = WIDTH - RIGHT + 16.0;
        put(format_args!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>\n\
             <line x1=\"{from}\" y1=\"{at}\" x2=\"{}\" y2=\"{at}\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>\n\
             <text x=\"{}\" y=\"{}\" font-size=\"12\" fill=\"#111827\">{}</text>\n",
            path.join(" "),
            from + 26.0,
            from + 34.0,
            at + 4.0,
            escaped(&line.name)
        ));
    }
    text.push_str("</svg>\n");
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_is_inside_and_every_line_is_named() {
        let line = |name: &str, gbps: f64| Line {
            name: name.to_owned(),
            dashed: false,
            points: vec![(4096, gbps / 2.0), (1 << 22, gbps)],
        };
        let chart = svg("a & b", "<gpu>", &[line("h2d", 55.0), line("d2h", 20.0)]);
        assert!(chart.contains("a &amp; b") && chart.contains("&lt;gpu>"));
        assert!(chart.contains(">h2d<") && chart.contains(">d2h<"));
        let drawn = chart.lines().filter(|line| line.starts_with("<polyline"));
        let mut count = 0;
        for line in drawn {
            let points = line.split('"').nth(1).unwrap();
            for point in points.split(' ') {
                let (x, y) = point.split_once(',').unwrap();
                let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                assert!((LEFT..=WIDTH - RIGHT).contains(&x), "{point}");
                assert!((TOP..=HEIGHT - BOTTOM).contains(&y), "{point}");
                count += 1;
            }
        }
        assert_eq!(count, 4);
    }
}
