//! `greenroom doctor`: what would go wrong on this machine, and what to do about it.
//!
//! Reads files and asks Python for version numbers; never initialises CUDA, never takes memory, changes nothing.

mod driver;
mod gpu;
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

    fn note(area: &'static str, found: impl Into<String>) -> Unanswered {
        Unanswered::new(area, Severity::Note, found)
    }

    fn warning(area: &'static str, found: impl Into<String>) -> Unanswered {
        Unanswered::new(area, Severity::Warning, found)
    }

    fn problem(area: &'static str, found: impl Into<String>) -> Unanswered {
        Unanswered::new(area, Severity::Problem, found)
    }
}

/// Something that is not as it should be: a finding once it says what to do.
#[must_use]
struct Unanswered(Finding);

impl Unanswered {
    fn new(area: &'static str, severity: Severity, found: impl Into<String>) -> Self {
        Self(Finding {
            severity,
            ..Finding::ok(area, found)
        })
    }

    fn do_this(self, action: impl Into<String>) -> Finding {
        Finding {
            action: Some(action.into()),
            ..self.0
        }
    }
}

pub(super) fn run(args: DoctorArgs) -> Result<(), CliError> {
    let settings = merged(args.config, args.settings)?;
    let root = Path::new("/");
    let mut findings = vec![driver::release(root)];
    findings.extend(driver::wsl(root));
    findings.extend(gpu::check(root));
    findings.extend(machine::memory(root, &settings));
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
    use std::fs;

    /// A made-up machine: files below a folder.
    pub(super) struct Root(tempfile::TempDir);

    impl Root {
        pub(super) fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        pub(super) fn path(&self) -> &Path {
            self.0.path()
        }

        pub(super) fn file(&self, path: &str, text: &str) -> &Self {
            let path = self.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
            self
        }

        pub(super) fn link(&self, path: &str, to: &str) -> &Self {
            let path = self.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(self.path().join(to), path).unwrap();
            self
        }
    }

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
        let json = |finding| serde_json::to_value::<Finding>(finding).unwrap();
        assert_eq!(
            json(Finding::warning("pcie", "x8 of x16").do_this("reseat it")),
            serde_json::json!({"area": "pcie", "severity": "warning", "found": "x8 of x16", "action": "reseat it"})
        );
        assert_eq!(
            json(Finding::ok("http", "free")),
            serde_json::json!({"area": "http", "severity": "ok", "found": "free"})
        );
    }
}
