"""Confidence intervals and tests for scores of rows that are not independent. Each question has one method.

==========================================  ===================================  =====================================
question                                    function                             method
==========================================  ===================================  =====================================
What would this model score on all images?  `mean_interval`, `ratio_interval`    Wilson at the effective number of rows
Do these two trained models differ on       `paired_difference` of               swaps image by image (approximate
images like these?                          `metrics.sum_metrics`                randomisation)
Do these two recipes differ, for new seeds  `compare_recipes`                    Obuchowski and Rockette's test with
and new images?                                                                  Hillis' degrees of freedom
What does a recipe score, for new seeds     `recipe_mean`                        the same for one recipe
and new images?
Are they the same, up to a margin?          `equivalence`, `is_no_worse`         one-sided tests (TOST)
What can this test set show?                `smallest_difference`,               minimum detectable effect, 80% power
                                            `planned_difference`
Which of several differences are real?      `holm_correction`                    Holm
==========================================  ===================================  =====================================

Questions about one image share its difficulty, and images of one patient share the patient. The unit that is drawn
at random is therefore the image, or the patient where the data name one: a *cluster*. All methods are closed
forms except the swaps, which are seeded. `benchmarks/statistics_checks.py` measures coverage, size and power.
"""
