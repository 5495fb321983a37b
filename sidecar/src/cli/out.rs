//! Writing for people and for scripts: aligned tables, sizes, JSON. The only place that touches standard output and standard error.

use std::io::{self, Write};

use serde::Serialize;

/// Writes a text to standard output.
pub(super) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Writes a value as JSON.
pub(super) fn print_json(value: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(io::Error::other)?;
    text.push('\n');
    print(&text)
}

/// Writes the reason of a failure to standard error; if even that is gone there is nobody left to tell.
pub(super) fn complain(text: &str) {
    let mut err = io::stderr().lock();
    drop(writeln!(err, "greenroom: {text}"));
}

/// Rows in columns as wide as their widest cell; columns that hold numbers are right-aligned.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells
            .chain([head[column].chars().count()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let number = |cell: &String| cell.parse::<f64>().is_ok() || cell == "-";
    let numeric: Vec<bool> = (0..head.len())
        .map(|column| !rows.is_empty() && rows.iter().all(|row| number(&row[column])))
        .collect();
    let mut text = String::new();
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    for row in std::iter::once(&head).chain(rows) {
        let cells = row
            .iter()
            .zip(&widths)
            .zip(&numeric)
            .map(|((cell, width), numeric)| {
                if *numeric {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:<width$}")
                }
            });
        let line = cells.collect::<Vec<_>>().join("  ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A size for people: three significant digits or so.
pub(super) fn size(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_right_and_words_left() {
        let rows = vec![
            vec!["a".to_owned(), "7".to_owned()],
            vec!["long".to_owned(), "1234567".to_owned()],
        ];
        assert_eq!(
            table(&["NAME", "N"], &rows),
            "NAME        N\na           7\nlong  1234567\n"
        );
        assert_eq!(table(&["NAME", "N"], &[]), "NAME  N\n");
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!(size(8 << 30), "8.0 GiB");
    }
}
