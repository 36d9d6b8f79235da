//! Established connections move: an OAP is drained, and gets its share again.

use std::time::{Duration, Instant};

use anyhow::Result;
use testkit::scenario::{Check, Report};

use crate::checks::{AGENTS_CONNECT_WITHIN, DATA_IS_STORED_WITHIN};
use crate::fixture::{Fixture, slashed};
use crate::layout::{self, AGENTS, ALS};

/// Room for all of them on two OAPs, also for a moment in which one is counted twice.
const QUOTA: u32 = 6;
/// The OAP that is drained.
const DRAINED: usize = 0;
/// Nothing moves for 30 s after the OAPs that are ready have changed, and only what was uneven for
/// 15 s; then one agent moves in a second, once it reports again.
const EVEN_WITHIN: Duration = Duration::from_secs(120);

impl Fixture<'_> {
    /// 2, second half: agents that are told to move lose nothing.
    pub fn agents_move(&mut self, report: &mut Report) -> Result<()> {
        self.set_quota(report, "2", QUOTA)?;
        let backend = AGENTS.backend(DRAINED).to_string();
        let begun = Instant::now();
        self.balancer.must(&["drain", &backend, "--timeout", "60s"]);
        let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
        report.tell("2 OAP 1 drained: empty", &took);
        self.agents_are(report, "2 OAP 1 drained: agent connections", "0/3/3")?;
        self.all_is_there(report, "2 OAP 1 drained: numbered segments, in any OAP")?;

        self.balancer.must(&["undrain", &backend]);
        self.balancer.configure(&layout::evened_out());
        self.balancer.reload();
        let begun = Instant::now();
        let step = "2 OAP 1 put back: agent connections";
        self.wait(report, step, EVEN_WITHIN, |fixture| {
            let loads = slashed(fixture.loads(AGENTS)?.connections);
            Ok(Check::new("2/2/2", loads))
        })?;
        let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
        report.tell("2 OAP 1 put back: even", &took);
        self.all_is_there(report, "2 OAP 1 put back: numbered segments, in any OAP")?;
        self.balancer.configure(&layout::configuration());
        self.balancer.reload();
        self.set_quota(report, "2", AGENTS.quota)?;
        self.access_log_moves(report)
    }

    /// Envoy keeps one call, which is ended between two messages.
    fn access_log_moves(&mut self, report: &mut Report) -> Result<()> {
        let before = self.loads(ALS)?.connections;
        let from = before.iter().position(|own| *own > 0).unwrap_or_default();
        let backend = ALS.backend(from).to_string();
        self.balancer.must(&["shed", &backend, "1"]);
        let step = "2 an access log moved: connections of its OAP";
        self.wait(report, step, AGENTS_CONNECT_WITHIN, |fixture| {
            fixture.envoy()?.request()?;
            Ok(Check::new(0, fixture.loads(ALS)?.connections[from]))
        })?;
        let step = "2 an access log moved: connections, sorted";
        self.wait(report, step, AGENTS_CONNECT_WITHIN, |fixture| {
            fixture.envoy()?.request()?;
            Ok(Check::new("1/1/0", slashed(fixture.loads(ALS)?.sorted())))
        })?;
        let (sent, stored) = (self.envoy()?.sent(), self.stored_access_logs()?);
        let seen = format!("{stored} of {sent} are stored by now");
        report.tell("2 an access log moved: numbered access logs", &seen);
        Ok(())
    }

    fn agents_are(&mut self, report: &mut Report, step: &str, expected: &str) -> Result<()> {
        self.wait(report, step, AGENTS_CONNECT_WITHIN, |fixture| {
            let loads = slashed(fixture.loads(AGENTS)?.connections);
            Ok(Check::new(expected, loads))
        })
    }

    /// Every segment that agents have made until now is in one of the OAPs.
    fn all_is_there(&mut self, report: &mut Report, step: &str) -> Result<()> {
        let made = self.agents.iter().map(|agent| {
            let number = agent.made().map_or(0, |last| last + 1);
            (agent.name().to_owned(), number)
        });
        let made: Vec<_> = made.collect();
        let expected: u32 = made.iter().map(|(_, number)| number).sum();
        self.wait(report, step, DATA_IS_STORED_WITHIN, |fixture| {
            let stored = fixture.stored_segments()?;
            let missing = made.iter().flat_map(|(name, number)| {
                let is_stored = |one: &u32| {
                    let of_agent = stored.iter().filter_map(|segments| segments.get(name));
                    of_agent.into_iter().any(|numbers| numbers.contains(one))
                };
                (0..*number)
                    .filter(|one| !is_stored(one))
                    .collect::<Vec<_>>()
            });
            let missing = u32::try_from(missing.count())?;
            Ok(Check::new(expected, expected - missing))
        })
    }
}
