//! `greenroom doctor`: what would go wrong on this machine, and what to do about it.
//!
//! Reads files and asks Python for version numbers; never initialises CUDA, never takes memory, changes nothing.

mod machine;
mod places;
mod vllm;

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::CliError;
use super::out;
use super::serve::merged;
use crate::config::Settings;

#[derive(Debug, clap::Args)]
pub(super) struct DoctorArgs {
    /// The file that `greenroom serve` will be given
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    /// The findings as JSON, for scripts
    #[arg(long)]
    json: bool,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Severity {
    /// As it should be.
    Ok,
    /// Good to know.
    Note,
    /// Works, but not as well as it could.
    Warning,
    /// Will not work.
    Problem,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// What was looked at.
    area: &'static str,
    severity: Severity,
    /// What was found.
    found: String,
    /// What to do; nothing if all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    action: Option<String>,
}

impl Finding {
    fn ok(area: &'static str, found: impl Into<String>) -> Self {
        Self {
            area,
            severity: Severity::Ok,
            found: found.into(),
            action: None,
        }
    }

    fn note(area: &'static str, found: impl Into<String>) -> Self {
        Self {
            severity: Severity::Note,
            ..Self::ok(area, found)
        }
    }

    fn warning(area: &'static str, found: impl Into<String>) -> Self {
        Self {
            severity: Severity::Warning,
            ..Self::ok(area, found)
        }
    }

    fn problem(area: &'static str, found: impl Into<String>) -> Self {
        Self {
            severity: Severity::Problem,
            ..Self::ok(area, found)
        }
    }

    fn do_this(self, action: impl Into<String>) -> Self {
        Self {
            action: Some(action.into()),
            ..self
        }
    }
}

pub(super) fn run(args: DoctorArgs) -> Result<(), CliError> {
    let settings = merged(args.config, args.settings)?;
    let root = Path::new("/");
    let mut findings = vec![machine::driver(root)];
    findings.extend(machine::pcie(root));
    findings.extend(machine::memory(&settings));
    findings.push(machine::memlock());
    findings.extend(places::check(&settings));
    findings.extend(vllm::check());
    if args.json {
        out::print_json(&serde_json::json!({ "findings": findings }))?;
    } else {
        out::print(&readable(&findings))?;
    }
    let problems = findings
        .iter()
        .filter(|f| f.severity == Severity::Problem)
        .count();
    match problems {
        0 => Ok(()),
        1 => Err(CliError::BadNews("1 problem".to_owned())),
        more => Err(CliError::BadNews(format!("{more} problems"))),
    }
}

fn readable(findings: &[Finding]) -> String {
    let mut text = String::new();
    let width = findings.iter().map(|f| f.area.len()).max().unwrap_or(0);
    for finding in findings {
        let mark = match finding.severity {
            Severity::Ok => "ok     ",
            Severity::Note => "note   ",
            Severity::Warning => "WARNING",
            Severity::Problem => "PROBLEM",
        };
        text.push_str(&format!(
            "{mark}  {:width$}  {}\n",
            finding.area, finding.found
        ));
        if let Some(action) = &finding.action {
            text.push_str(&format!("{:9}{:width$}  -> {action}\n", "", ""));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_read_well_and_say_what_to_do() {
        let text = readable(&[
            Finding::ok("driver", "NVIDIA 580"),
            Finding::problem("memory", "does not fit").do_this("give a smaller --memory"),
        ]);
        assert_eq!(
            text,
            "ok       driver  NVIDIA 580\nPROBLEM  memory  does not fit\n                 -> give a smaller --memory\n"
        );
    }

    #[test]
    fn scripts_get_the_severity_as_a_word() {
        let json = serde_json::to_value(Finding::warning("pcie", "x8 of x16")).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"area": "pcie", "severity": "warning", "found": "x8 of x16"})
        );
    }
}
